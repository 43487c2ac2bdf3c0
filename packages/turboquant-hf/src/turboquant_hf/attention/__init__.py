"""`attn_implementation="turboquant"`: attention on what a layer stores."""
