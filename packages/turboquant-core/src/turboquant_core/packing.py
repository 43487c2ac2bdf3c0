"""Codes of 1 to 8 bits in bytes, with no padding: 3 bits are 3 bits.

A code of b bits is split into planes whose widths are powers of two, low bits in the widest plane, which comes first
(3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1). In the plane of width w, byte j holds coordinate j + i * n in bits
[i*w, (i+1)*w), where n = num_channels * w / 8 is the plane's size in bytes. So every byte unpacks by shifts alone
(byte j of a 4-bit plane holds coordinates j and j + d/2), and a kernel that unpacks one field of a plane gets a
contiguous range of coordinates without shuffling.
"""

from dataclasses import dataclass

import torch

from turboquant_core._checks import check_bits

_PLANE_WIDTHS = (8, 4, 2, 1)


@dataclass(frozen=True)
class BitPlane:
    """A slice of every code of a vector.

    Attributes:
        width: Bits of each code held here: 1, 2, 4 or 8.
        shift: Position of those bits in the code.
        offset: First byte of the plane in the packed vector.
        num_bytes: Size of the plane in bytes.
    """

    width: int
    shift: int
    offset: int
    num_bytes: int

    @property
    def codes_per_byte(self) -> int:
        """How many codes share one byte of the plane."""
        return 8 // self.width


def bit_planes(num_channels: int, bits: int) -> tuple[BitPlane, ...]:
    """The planes of `num_channels` codes of `bits` bits, in storage order.

    Raises:
        ValueError: If `bits` is not from 1 to 8, or `num_channels` is no positive multiple of 8.
    """
    check_bits(bits)
    if num_channels <= 0 or num_channels % 8:
        raise ValueError(f"cannot pack {num_channels} channels; a multiple of 8 fills whole bytes")
    planes = []
    shift = offset = 0
    for width in _PLANE_WIDTHS:
        if bits & width:
            plane = BitPlane(width, shift, offset, num_channels * width // 8)
            planes.append(plane)
            shift += width
            offset += plane.num_bytes
    return tuple(planes)


def packed_bytes(num_channels: int, bits: int) -> int:
    """Bytes that `num_channels` codes of `bits` bits take."""
    return sum(plane.num_bytes for plane in bit_planes(num_channels, bits))


def pack(codes: torch.Tensor, bits: int, *, check: bool = True) -> torch.Tensor:
    """Pack codes [..., num_channels], integers from 0 to 2**bits - 1, into uint8 [..., num_channels * bits / 8].

    Args:
        codes: The codes.
        bits: Bits per code, from 1 to 8.
        check: Look at the codes' range first, which waits for the device. False where it is known.

    Raises:
        ValueError: If `bits`, type or shape does not fit, or a code needs more bits than it has.
    """
    if codes.ndim == 0 or codes.is_floating_point():
        raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}; pack takes integers [..., num_channels]")
    planes = bit_planes(codes.shape[-1], bits)
    if check and codes.numel():
        low, high = codes.aminmax()
        if int(low) < 0 or int(high) >= 2**bits:
            raise ValueError(f"codes run from {int(low)} to {int(high)}; {bits} bits hold 0 to {2**bits - 1}")
    codes = codes.to(torch.uint8)
    packed = [_pack_plane(codes, plane) for plane in planes]
    return packed[0] if len(packed) == 1 else torch.cat(packed, dim=-1)


def unpack(packed: torch.Tensor, bits: int, num_channels: int) -> torch.Tensor:
    """Undo `pack`: uint8 [..., num_channels * bits / 8] to uint8 codes [..., num_channels].

    Raises:
        ValueError: If the last dimension is not `num_channels * bits / 8`, or the type is not uint8.
    """
    planes = bit_planes(num_channels, bits)
    expected = packed_bytes(num_channels, bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != expected:
        raise ValueError(
            f"got {packed.dtype} [..., {packed.shape[-1]}]; {num_channels} codes of {bits} bits are "
            f"torch.uint8 [..., {expected}]"
        )
    codes = _unpack_plane(packed, planes[0])
    for plane in planes[1:]:
        codes |= _unpack_plane(packed, plane)
    return codes


def _pack_plane(codes: torch.Tensor, plane: BitPlane) -> torch.Tensor:
    field = (codes >> plane.shift) & ((1 << plane.width) - 1)
    field = torch.unflatten(field, -1, (plane.codes_per_byte, plane.num_bytes))
    packed = field[..., 0, :].clone()
    for i in range(1, plane.codes_per_byte):
        packed |= field[..., i, :] << (i * plane.width)
    return packed


def _unpack_plane(packed: torch.Tensor, plane: BitPlane) -> torch.Tensor:
    stored = packed[..., plane.offset : plane.offset + plane.num_bytes]
    mask = (1 << plane.width) - 1
    fields = [((stored >> (i * plane.width)) & mask) << plane.shift for i in range(plane.codes_per_byte)]
    return torch.cat(fields, dim=-1)
