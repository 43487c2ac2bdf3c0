"""The model whose shape benchmarks on a GPU have: Llama-3.1-8B. Speed does not depend on the values of weights."""

from turboquant_core.testing import MODEL_SHAPES

MODEL = next(shape for shape in MODEL_SHAPES if shape.name == "Llama-3.1-8B")
ROPE_THETA = 500000.0
SIZES = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": MODEL.num_layers,
    "num_attention_heads": MODEL.num_heads,
    "num_key_value_heads": MODEL.num_kv_heads,
    "head_dim": MODEL.head_dim,
    "max_position_embeddings": 131072,
}
"""Fields of the configuration that say how large it is."""
