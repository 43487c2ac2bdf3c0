"""`turboquant calibrate`: the mean key of every layer, taken from a text, for turboquant-vllm."""
