"""Decode attention on codes: rotate the query, attend in split tiles, merge and un-rotate."""
