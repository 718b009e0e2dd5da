"""Buildings as polygons: connected pixels of the masks of a run, whole across the borders of its tiles and parts."""
