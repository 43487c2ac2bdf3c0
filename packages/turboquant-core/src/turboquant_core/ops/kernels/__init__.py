"""Triton kernels and their launches. Importing a module of this package imports Triton."""
