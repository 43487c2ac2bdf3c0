"""Gluon primitives for what every lane of a warp keeps."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def lane_constant(table, index: gl.constexpr):
    """Constant `index` of a table int32 [constants, 32 lanes] that holds every constant once for each lane.

    A value that the compiler can tell to be the same in all lanes goes to a uniform register, from which every byte
    permute would copy it first.
    """
    asm: gl.constexpr = (
        "{ .reg .b32 lane; .reg .b64 at; mov.u32 lane, %laneid; mul.wide.u32 at, lane, 4; add.s64 at, at, $1; "
        "ld.global.b32 $0, [at]; }"
    )
    return gl.inline_asm_elementwise(asm, "=r,l", [table + index * 32], dtype=gl.int32, is_pure=True, pack=1)
