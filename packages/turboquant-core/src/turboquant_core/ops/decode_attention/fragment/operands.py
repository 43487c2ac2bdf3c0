"""Gluon primitives: codes to tensor-core operands in registers.

A warp reads the codes of sixteen tokens straight into the registers in which the tensor cores want their operand, looks
the centroids up there and multiplies. Which lane holds which channel is free as long as the query (for keys) and the
un-rotation (for values) list channels in the same order, which is that of `positions`; the `convert_layout`s to
operands are asserted to be no instruction.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def mma_layout():
    """m16n8k16: 16 rows over lanes 4 apart, 8 columns over 4 neighbouring lanes."""
    return gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])


@gluon.constexpr_function
def left_layout(each):
    """Operand A of float16, two in a register (`each`), or of int8, four."""
    return gl.DotOperandLayout(0, mma_layout(), each)


@gluon.constexpr_function
def right_layout(each):
    """Operand B."""
    return gl.DotOperandLayout(1, mma_layout(), each)


@gluon.constexpr_function
def head_layout(heads):
    """[16 tokens, heads]: the accumulator's of twice as many columns, where a head has two neighbours, in one lane."""
    tiles = [[0, 4 << i] for i in range((heads // 4).bit_length() - 1)]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[8, 0], *tiles], lanes, [], [], [16, heads])


@gluon.constexpr_function
def key_word_layout(words):
    """[16 tokens, words]: neighbouring words in a lane, for wide reads; four lanes a token."""
    registers = [[0, 1 << i] for i in range(words.bit_length() - 3)]
    lanes = [[0, words // 4], [0, words // 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([*registers, [8, 0]], lanes, [], [], [16, words])


@gluon.constexpr_function
def value_word_layout(words):
    """[16 tokens, words]: eight lanes a token; a lane holds both tokens of a pair, which share an operand register."""
    registers = [[0, 1 << i] for i in range(words.bit_length() - 4)]
    lanes = [[2, 0], [4, 0], [0, words // 8], [0, words // 4], [0, words // 2]]
    return gl.DistributedLinearLayout([*registers, [1, 0], [8, 0]], lanes, [], [], [16, words])


@gluon.constexpr_function
def value_pair_layout(words):
    """The same, with the two tokens of a pair in neighbouring registers."""
    registers = [[0, 1 << i] for i in range(words.bit_length() - 4)]
    lanes = [[2, 0], [4, 0], [0, words // 8], [0, words // 4], [0, words // 2]]
    return gl.DistributedLinearLayout([[1, 0], *registers, [8, 0]], lanes, [], [], [16, words])


@gluon.jit
def key_operand(words, table, head_dim: gl.constexpr, asm: gl.constexpr, constraints: gl.constexpr, pair: gl.constexpr):
    """Words of 16 tokens to operand A, int8 [16 tokens, head_dim]; `pair` says whether codes come in two words."""
    args = _key_arguments(words, table, pair)
    a, b = gl.inline_asm_elementwise(asm, constraints, args, dtype=(gl.int8, gl.int8), is_pure=True, pack=4)
    return _key_positions(a, b, head_dim)


@gluon.jit
def half_operands(words, table, half: gl.constexpr, asm: gl.constexpr, constraints: gl.constexpr, pair: gl.constexpr):
    """Words of 16 tokens of split keys to an operand A of each half, int8 [16 tokens, half]."""
    args = _key_arguments(words, table, pair)
    a, b, c, d = gl.inline_asm_elementwise(
        asm, constraints, args, dtype=(gl.int8, gl.int8, gl.int8, gl.int8), is_pure=True, pack=4
    )
    return _key_positions(a, b, half), _key_positions(c, d, half)


@gluon.jit
def _key_arguments(words, table, pair: gl.constexpr):
    """What a look-up of keys takes: the same operand for all four elements of a register."""
    if pair:
        return (_twice(_twice(words[0])), _twice(_twice(words[1]))) + table
    else:
        return (_twice(_twice(words[0])),) + table


@gluon.jit
def _key_positions(a, b, head_dim: gl.constexpr):
    """Numbers of the two words of eight codes as operand A, int8 [16 tokens, head_dim]."""
    count: gl.constexpr = head_dim // 8
    # token, word over lanes, word in a lane, code, half of the word
    x = gl.reshape(gl.join(a, b), [16, 4, count // 4, 4, 2])
    x = gl.reshape(gl.permute(x, [0, 2, 4, 1, 3]), [16, head_dim])
    return gl.convert_layout(x, left_layout(4), assert_trivial=True)


@gluon.jit
def value_operand(
    words, table, head_dim: gl.constexpr, asm: gl.constexpr, constraints: gl.constexpr, pair: gl.constexpr
):
    """Words of 16 tokens to operand A, float16 [head_dim, 16 tokens]."""
    count: gl.constexpr = head_dim // 8
    even, odd = _split_tokens(words[0], count)
    if pair:
        even_high, odd_high = _split_tokens(words[1], count)
        args = (_twice(even), _twice(even_high), _twice(odd), _twice(odd_high)) + table
    else:
        args = (_twice(even), _twice(odd)) + table
    a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
        asm,
        constraints,
        args,
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )
    x = gl.join(_join4(a, b, c, d), _join4(e, f, g, h))
    # token pair, word over lanes, word in a lane, token of the pair, place in the half, half of the word
    x = gl.reshape(x, [8, 8, count // 8, 2, 4, 2])
    x = gl.reshape(gl.permute(x, [2, 5, 4, 1, 0, 3]), [head_dim, 16])
    return gl.convert_layout(x, left_layout(2), assert_trivial=True)


@gluon.jit
def weight_operand(weights, columns: gl.constexpr):
    """Weights in the accumulator's layout, float32 [16 tokens, columns], to operand B, float16 of the same shape.

    The instruction transposes 8 x 8 tiles across the warp, so what it leaves in this layout is the transpose of each
    tile; naming the axes accordingly undoes that, and the layout becomes the operand's.
    """
    x = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
        "=r,r",
        [weights.to(gl.float16)],
        dtype=gl.float16,
        is_pure=False,
        pack=2,
    )
    x = gl.permute(gl.reshape(x, [2, 8, columns // 8, 8]), [0, 3, 2, 1])
    return gl.convert_layout(gl.reshape(x, [16, columns]), right_layout(2), assert_trivial=True)


@gluon.jit
def parts_of_heads(columns, heads: gl.constexpr):
    """Columns [16 tokens, 2 * heads], two neighbours a head, as two tensors [16 tokens, heads]."""
    high, low = gl.split(gl.reshape(columns, [16, heads, 2]))
    layout: gl.constexpr = head_layout(heads)
    return gl.convert_layout(high, layout, assert_trivial=True), gl.convert_layout(low, layout, assert_trivial=True)


@gluon.constexpr_function
def value_columns(heads):
    """Columns of the products with values: four heads fill every other one of eight."""
    return max(8, heads)


@gluon.jit
def head_of_column(column, heads: gl.constexpr):
    """The head of a column of the products with values: see `columns_of_heads`."""
    if heads == 4:
        return column // 2
    else:
        return column // 8 * 8 + column % 2 * 4 + column % 8 // 2


@gluon.jit
def columns_of_heads(x, heads: gl.constexpr):
    """[16 tokens, heads] to columns of the products with values, without leaving a lane: [16 tokens, columns].

    A lane has heads q, q + 4, …, and in the accumulator columns 2q and 2q + 1 of every eight.
    """
    if heads == 4:
        wide = gl.reshape(gl.join(x, gl.zeros_like(x)), [16, 8])
    else:
        wide = gl.reshape(gl.permute(gl.reshape(x, [16, heads // 8, 2, 4]), [0, 1, 3, 2]), [16, heads])
    return gl.convert_layout(wide, mma_layout(), assert_trivial=heads == 4)


@gluon.jit
def column_of_heads(x, heads: gl.constexpr):
    """The same of one row [heads]."""
    if heads == 4:
        wide = gl.reshape(gl.join(x, x), [8])
    else:
        wide = gl.reshape(gl.permute(gl.reshape(x, [heads // 8, 2, 4]), [0, 2, 1]), [heads])
    return gl.convert_layout(wide, gl.SliceLayout(0, mma_layout()), assert_trivial=False)


@gluon.jit
def wait_for_previous_kernel():
    """Wait until the kernel before this one has finished, where this one was launched while that one ran."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_next_kernel_start():
    """Let the next kernel be launched, as far as it does not wait for this one."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _twice(words):
    """The same operand for both elements of a pair."""
    return gl.join(words, words)


@gluon.jit
def _split_tokens(words, count: gl.constexpr):
    # Splitting takes neighbouring registers: only their names change here.
    words = gl.convert_layout(words, value_pair_layout(count), assert_trivial=False)
    return gl.split(gl.permute(gl.reshape(words, [8, 2, count]), [0, 2, 1]))


@gluon.jit
def _join4(a, b, c, d):
    """[...] four times to [..., 4]."""
    x = gl.join(gl.join(a, c), gl.join(b, d))
    shape: gl.constexpr = x.type.shape[:-2]
    return gl.reshape(x, shape + [4])
