"""Layers of a cache: growing, sliding, static, hybrid and cross, and which of them a cache has."""
