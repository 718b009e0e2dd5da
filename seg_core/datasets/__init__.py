"""Training datasets made from scenes and the labels that people have: cut, burnt, split and checked."""
