"""`turboquant tune`: bits of every layer under a budget of bytes, into a file that both integrations load."""
