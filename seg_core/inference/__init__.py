"""Where imagery and model meet, without Ray: windows, scores, and windows that are segmented again."""
