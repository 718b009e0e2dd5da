"""Figures and pictures to look at."""
