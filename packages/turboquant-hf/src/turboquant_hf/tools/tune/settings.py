"""What a search for bits measures, and by how much."""

from dataclasses import asdict, dataclass
from typing import Any

TUNE = "turboquant tune"


@dataclass(frozen=True)
class TuneSettings:
    """What is measured.

    Attributes:
        text_sha256: Digest of the text.
        num_tokens: Its first tokens, on which layers are measured.
        held_out_tokens: The tokens after those, on which bits are compared.
        probe_bits: Bits of the layer that is measured, one after the other.
        chunk_size: Tokens of a forward pass.
    """

    text_sha256: str
    num_tokens: int
    held_out_tokens: int
    probe_bits: tuple[int, ...]
    chunk_size: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self) | {"probe_bits": list(self.probe_bits)}
