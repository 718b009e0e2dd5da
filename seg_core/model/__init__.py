"""Trained models: the bundle, the networks, and the segmenter that runs one. Without rasterio."""
