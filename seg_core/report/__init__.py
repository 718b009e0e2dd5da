"""A run as one HTML page to look at: map, histogram, tables and facts."""
