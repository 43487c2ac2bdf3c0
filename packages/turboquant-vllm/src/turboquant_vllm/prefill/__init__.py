"""Attention of rows that prefill."""
