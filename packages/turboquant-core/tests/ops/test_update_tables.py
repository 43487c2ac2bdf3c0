import pytest
import torch
import triton
import triton.language as tl

from turboquant_core import grid_codebook
from turboquant_core.ops._padding import padded_octet
from turboquant_core.ops.cache_update import grid_table as module
from turboquant_core.ops.cache_update.grid_table import UNITS, grid_table
from turboquant_core.ops.cache_update.quantize import nearest_ranks
from turboquant_core.ops.cache_update.split_rotation import MATRIX_SCALE, split_rotation
from turboquant_core.ops.cache_update.triton.sizes import Processor, update_launch
from turboquant_core.rotation import Rotation

STEP = 1 / UNITS


@triton.jit
def _nearest_ranks_kernel(y, codes, entries, cells: tl.constexpr, shift: tl.constexpr, size: tl.constexpr):
    place = tl.arange(0, size)[None, :]
    ones = tl.full([1], 1.0, tl.float32)
    found = nearest_ranks(tl.load(y + place), ones, tl.load(entries + tl.arange(0, cells)), shift)
    tl.store(codes + place, found)


def codes_of(y, head_dim, bits):
    table = grid_table(head_dim, bits, y.device)
    size = triton.next_power_of_2(len(y))
    padded = torch.zeros(size, device=y.device)
    padded[: len(y)] = y
    codes = torch.empty(size, dtype=torch.int32, device=y.device)
    _nearest_ranks_kernel[(1,)](padded, codes, table.entries, len(table.entries), table.shift, size)
    return codes[: len(y)].cpu()


@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256, 512])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_those_of_bucketize_up_to_a_step_from_every_boundary(device, head_dim, bits):
    boundaries = grid_codebook(head_dim, bits).boundaries
    near = torch.cat([boundaries + side * steps * STEP for side in (-1, 1) for steps in (1, 2, 3, 100)])
    cells = torch.arange(-64, 64) / 64
    y = torch.cat([near, cells, cells + STEP, torch.linspace(-1, 1, 997), torch.tensor([-1 - 2e-7, 1 + 2e-7])]).float()
    away = (y[:, None].double() - boundaries).abs().min(1).values > 0.75 * STEP
    assert away[: len(near)].all()
    expected = torch.bucketize(y.double(), boundaries)
    actual = codes_of(y.to(device), head_dim, bits)
    assert torch.equal(actual[away], expected[away].int())
    assert ((actual - expected).abs() <= 1).all()


def test_zero_has_the_code_below_and_nan_stays_in_the_table(device):
    y = torch.tensor([0.0, -0.0, float("nan"), float("inf")], device=device)
    assert codes_of(y, 128, 4).tolist()[:2] == [7, 7]
    assert all(0 <= code < 16 for code in codes_of(y, 128, 4).tolist())


def test_tables_are_small(device):
    assert len(grid_table(128, 4, device).entries) == 128
    assert max(len(grid_table(d, 8, device).entries) for d in (64, 128, 512)) <= 4096


def test_a_table_that_would_be_too_big_is_refused(monkeypatch, device):
    monkeypatch.setattr(module, "MAX_CELLS", 64)
    with pytest.raises(ValueError, match="8 bits at head_dim 88 need more than 64 cells"):
        grid_table(88, 8, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 192, 256])
def test_parts_add_up_to_the_rotation(device, head_dim, dtype):
    rotation = split_rotation(head_dim, dtype, device)
    octet, padded = head_dim // 8, padded_octet(head_dim)
    total = rotation.parts.double().sum(0).cpu().reshape(8 * padded, 8, padded)
    matrix = total[:head_dim, :, :octet].reshape(head_dim, head_dim) / MATRIX_SCALE
    error = (matrix - Rotation(head_dim).matrix.T).norm(dim=0).max()
    assert error <= (0 if head_dim in (64, 128, 256) else 2**-22)
    total[:head_dim, :, :octet] = 0
    assert not total.any()


def test_a_rotation_of_few_bits_is_one_matrix(device):
    assert [split_rotation(d, torch.float16, device).num_parts for d in (64, 128, 256, 512)] == [1, 1, 1, 1]
    assert [split_rotation(d, torch.bfloat16, device).num_parts for d in (64, 128, 256, 96)] == [1, 1, 2, 3]


H200 = Processor(132, 227 * 1024)
SMALL = Processor(128, 99 * 1024)


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 8192])
@pytest.mark.parametrize("num_kv_heads", [1, 3, 8, 500])
@pytest.mark.parametrize("channels", [64, 128, 256, 512])
def test_every_program_keeps_to_one_head_and_no_program_is_idle(num_tokens, num_kv_heads, channels):
    launch = update_launch(num_tokens, num_kv_heads, channels, 2, 1, H200, one_path=True)
    assert launch.num_programs % (2 * num_kv_heads) == 0
    assert launch.num_programs <= 2 * num_kv_heads * -(-num_tokens // launch.block_rows)
    assert channels % launch.block_k == 0
    assert launch.block_rows >= 16


def test_rotations_that_do_not_fit_are_read_in_slices():
    assert update_launch(8192, 8, 128, 2, 1, H200, one_path=True).block_k == 128
    assert update_launch(8192, 8, 128, 2, 1, SMALL, one_path=True).block_k == 128
    assert update_launch(8192, 8, 128, 3, 1, SMALL, one_path=True).block_k == 64
    assert update_launch(8192, 8, 256, 2, 1, H200, one_path=True).block_k == 32


def test_registers_are_limited_where_that_makes_room_for_a_third_program():
    third = update_launch(8192, 8, 128, 1, 1, H200, one_path=True)
    assert third.num_programs == 16 * (3 * 132 // 16)
    assert third.compiler_options == {"maxnreg": 168}
    for launch in (
        update_launch(8192, 8, 128, 1, 1, H200, one_path=False),
        update_launch(8192, 8, 128, 1, 1, SMALL, one_path=True),
        update_launch(8192, 8, 128, 2, 1, H200, one_path=True),
        update_launch(8192, 8, 128, 1, 2, H200, one_path=True),
    ):
        assert launch.num_programs <= 16 * (2 * 132 // 16)
        assert launch.compiler_options == {}
