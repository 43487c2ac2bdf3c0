"""Attention shapes of real models."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """How the attention of one model is laid out.

    Attributes:
        name: The model's published name.
        num_layers: Attention layers.
        num_heads: Query heads of a layer.
        num_kv_heads: Key and value heads of a layer.
        head_dim: Dimension of every head.
    """

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


MODEL_SHAPES = (
    ModelShape("SmolLM2-135M", num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64),
    ModelShape("Qwen2.5-Coder-1.5B", num_layers=28, num_heads=12, num_kv_heads=2, head_dim=128),
    ModelShape("Llama-3.1-8B", num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128),
    ModelShape("Llama-3.1-70B", num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128),
    ModelShape("Qwen3-8B", num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128),
    ModelShape("Gemma-3-4B", num_layers=34, num_heads=8, num_kv_heads=4, head_dim=256),
    ModelShape("Phi-3-mini", num_layers=32, num_heads=32, num_kv_heads=32, head_dim=96),
    ModelShape("gpt-oss-20b", num_layers=24, num_heads=64, num_kv_heads=8, head_dim=64),
    ModelShape("Mistral-7B", num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128),
    ModelShape("StableLM-3B", num_layers=32, num_heads=32, num_kv_heads=32, head_dim=80),
)
