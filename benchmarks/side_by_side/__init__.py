"""TurboQuantCache beside the caches of transformers: quality, bytes, speed and lifecycle of each."""
