"""`turboquant doctor`: what a model's configuration and file headers say about compressing its KV cache."""
