"""Imagery on disk or in S3: scenes, their bands and georeference, and the pixels of their windows. Without torch."""
