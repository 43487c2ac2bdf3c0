"""Layers that attend to an image, as Llama 3.2 Vision has: their keys and values do not grow with text."""

from turboquant_hf._compat import DynamicLayer


class CrossAttentionLayer(DynamicLayer):
    """Keys and values of an image as they are, which the model itself reads from the layer."""

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing: tokens that are taken back are text."""
