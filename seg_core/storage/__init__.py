"""Files on disk and in S3."""
