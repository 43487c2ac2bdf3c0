import numpy as np
import pytest
import torch

from turboquant_core import KVCacheLayout, TurboQuantConfig, grid_codebook
from turboquant_core.key_transform import IDENTITY, KeyTransform
from turboquant_core.ops import _dispatch, _path
from turboquant_core.ops.cache_update.paths import choose_path
from turboquant_core.ops.cache_update.warpgroup.columns import finest_plane, product_columns
from turboquant_core.ops.cache_update.warpgroup.lane_table import FLOAT_ONE, LANES, SHIFT, UNITS, lane_table
from turboquant_core.ops.cache_update.warpgroup.launch import TILE_TOKENS, num_programs

CPU = torch.device("cpu")
BITS = (2, 3, 4)


def codes_of(y, head_dim, bits):
    """What `lane_ranks` computes, with fused multiply-adds in float64."""
    table = lane_table(head_dim, bits, CPU)
    with np.errstate(invalid="ignore"):
        fixed = np.nan_to_num(np.clip((y.double().numpy() * table.factor + 0.5).astype(np.float32), 0, 1))
    fixed = (1 + fixed.astype(np.float64) * UNITS / 2**23).astype(np.float32).view(np.int32)
    fixed = torch.from_numpy(fixed)
    return (fixed + table.lanes[0][(fixed >> SHIFT) % LANES]) >> SHIFT


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_codes_are_those_of_bucketize_up_to_a_step_from_every_boundary(head_dim, bits):
    boundaries = grid_codebook(head_dim, bits).boundaries
    step = 1 / (lane_table(head_dim, bits, CPU).factor * UNITS)
    near = torch.cat([boundaries + side * steps * step for side in (-1, 1) for steps in (2, 3, 100)])
    cells = (torch.arange(LANES + 1) / LANES - 0.5) / lane_table(head_dim, bits, CPU).factor
    y = torch.cat([near, cells, cells + step, torch.linspace(-1, 1, 99_991)]).float()
    away = (y[:, None].double() - boundaries).abs().min(1).values > 1.5 * step
    assert away[: len(near)].all()
    expected = torch.bucketize(y.double(), boundaries)
    actual = codes_of(y, head_dim, bits)
    assert torch.equal(actual[away], expected[away].int())
    assert ((actual - expected).abs() <= 1).all()


def test_a_code_is_found_to_float32_accuracy():
    # Rounding twice, to the 23 bits of a range in which all boundaries lie, is nearer than float32 products are.
    assert all(1 / (lane_table(d, b, CPU).factor * UNITS) < 2**-22 for d in (64, 128) for b in BITS)


@pytest.mark.parametrize("bits", BITS)
def test_zero_has_the_code_below_and_nan_a_code(bits):
    y = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")])
    top = 2**bits - 1
    assert codes_of(y, 128, bits).tolist() == [top // 2, top // 2, 0, top, 0]


@pytest.mark.parametrize("bits", BITS)
def test_lanes_hold_the_centroids(bits):
    centroids = lane_table(128, bits, CPU).lanes[1].view(torch.float32)
    assert torch.equal(centroids[: 2**bits].double(), grid_codebook(128, bits).centroids)
    assert lane_table(128, bits, CPU).lanes.dtype == torch.int32
    assert torch.tensor(1.0).view(torch.int32) == FLOAT_ONE


def test_codebooks_with_more_boundaries_than_lanes_are_refused():
    with pytest.raises(ValueError, match=r"6 bits at head_dim 128 need more than 32 cells\. Use at most 4"):
        lane_table(128, 6, CPU)


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_a_thread_has_all_channels_of_its_bytes(channels, bits):
    columns = product_columns(channels, bits)
    assert torch.equal(columns.sort().values, torch.arange(channels))
    thread_of = torch.empty(channels, dtype=torch.int64)
    thread_of[columns] = torch.arange(channels) % 8 // 2
    for width in (1, 2, 4):
        if bits & width:
            plane_bytes = width * channels // 8
            owners = thread_of.view(8 // width, plane_bytes)
            assert (owners == owners[0]).all()
            run = min(4, finest_plane(bits) * channels // 32)
            assert (owners[0].view(-1, run) == owners[0].view(-1, run)[:, :1]).all()


@pytest.mark.parametrize("num_tokens", [17, 64, 65, 8192, 10**6])
@pytest.mark.parametrize("num_kv_heads", [1, 3, 8, 500])
def test_every_program_keeps_to_one_head_and_none_is_idle(num_tokens, num_kv_heads):
    programs = num_programs(num_tokens, num_kv_heads, 132)
    assert programs % (2 * num_kv_heads) == 0
    assert 1 <= programs // (2 * num_kv_heads) <= -(-num_tokens // TILE_TOKENS)


LAYOUT = KVCacheLayout(TurboQuantConfig(128, 4, 4), 2, 16)


def vectors(layout=LAYOUT, num_tokens=64, dtype=torch.bfloat16, stride=None):
    heads, head_dim = layout.num_kv_heads, layout.config.head_dim
    return torch.zeros(num_tokens, stride or heads * head_dim, dtype=dtype)[:, : heads * head_dim].view(
        num_tokens, heads, head_dim
    )


SPLIT = KVCacheLayout(TurboQuantConfig(128, 4, 4, key_split=True), 2, 16)
SCALED = KeyTransform(scale=torch.full((2, 128), 2.0))


def pages_of(layout=LAYOUT, padding=0):
    return torch.zeros(4, layout.num_kv_heads, layout.head_bytes + padding, dtype=torch.uint8)[..., : layout.head_bytes]


class OnHopper(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch):
    def pretend(capability=(9, 0), hip=None):
        monkeypatch.setattr(_path, "interpreting", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)

    return pretend


def choose(path="auto", layout=LAYOUT, key_transform=IDENTITY, key=None, value=None, pages=None):
    key = vectors(layout) if key is None else key
    tensors = (key, key if value is None else value, pages_of(layout) if pages is None else pages)
    chosen = choose_path(path, layout, key_transform, *(x.as_subclass(OnHopper) for x in tensors))
    return "reference" if chosen is None else chosen.name


def test_hopper_takes_warpgroups_unless_there_is_little_to_do(hopper):
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
    hopper()
    assert choose() == "warpgroup"
    assert choose(key=vectors(num_tokens=16)) == "triton"
    assert choose("warpgroup", key=vectors(num_tokens=16)) == "warpgroup"
    assert choose("triton") == "triton"
    assert choose("reference") == "reference"


@pytest.mark.parametrize(
    ("reason", "arguments"),
    [
        ("head_dim is 96, and it takes 64, 128", {"layout": KVCacheLayout(TurboQuantConfig(96, 4, 4), 2, 16)}),
        ("key_bits is 8, and it takes 2, 3, 4", {"layout": KVCacheLayout(TurboQuantConfig(128, 8, 4), 2, 16)}),
        ("value_bits is 6, and it takes 2, 3, 4", {"layout": KVCacheLayout(TurboQuantConfig(128, 4, 6), 2, 16)}),
        ("keys are split, and it takes keys of one width", {"layout": SPLIT}),
        ("keys go through a scale or an order, and it takes a mean alone", {"key_transform": SCALED}),
        ("key is torch.float32, and it takes", {"key": vectors(dtype=torch.float32)}),
        (r"value starts at .* strides \[264, .* multiples of 16", {"value": vectors(stride=264)}),
        (r"pages starts at .* multiples of 4", {"pages": pages_of(padding=2)}),
    ],
)
def test_what_warpgroups_cannot_do_is_named_and_left_to_triton(hopper, reason, arguments):
    hopper()
    assert choose(**arguments) == "triton"
    with pytest.raises(ValueError, match=f"path is 'warpgroup', which cannot run here: {reason}.* Use path='auto'"):
        choose("warpgroup", **arguments)


@pytest.mark.parametrize(
    ("capability", "hip", "reason"), [((8, 0), None, "sm_80"), ((10, 0), None, "sm_100"), ((9, 0), "6", "NVIDIA's")]
)
def test_other_cards_take_triton(hopper, capability, hip, reason):
    hopper(capability, hip)
    assert choose() == "triton"
    with pytest.raises(ValueError, match=reason):
        choose("warpgroup")


@pytest.mark.usefixtures("looks_for_gluon")
def test_a_triton_without_gluon_is_told(hopper, monkeypatch):
    hopper()
    monkeypatch.setattr(_dispatch, "find_spec", lambda name: None)
    assert choose() == "triton"
    with pytest.raises(ValueError, match=r"no Gluon for sm_90; 3\.6 has"):
        choose("warpgroup")


# The kernel's arguments are those that the launch passes, so they need no list here.
COMPILE = """
import os
from pathlib import Path
os.environ.pop("TRITON_INTERPRET", None)
import torch
from turboquant_core import KVCacheLayout, KeyTransform, TurboQuantConfig
from turboquant_core.ops.cache_update.tensors import UpdateTensors
from turboquant_core.ops.cache_update.warpgroup import launch as module
from turboquant_core.testing.compiled import Recorder

def report(head_dim, key_bits, value_bits, dtype, centred, folder):
    layout = KVCacheLayout(TurboQuantConfig(head_dim, key_bits, value_bits), 8, 16)
    x = torch.zeros(64, 8, head_dim, dtype=dtype)
    module._num_sms = lambda device: 132
    module.warpgroup_update_kernel = recorder = Recorder(module.warpgroup_update_kernel)
    transform = KeyTransform(torch.zeros(8, head_dim) if centred else None)
    launch = module.plan(layout, dtype, 64, x.device)
    launch(UpdateTensors.of(x, x, transform, torch.arange(64), layout.allocate(4)), 64, 4)
    compiled = recorder.compile(90, Path(folder))
    print(compiled.ptx.count("wgmma.mma_async"), compiled.shared_bytes, compiled.registers, compiled.stack_bytes)
"""


@pytest.mark.parametrize(
    "case",
    [(128, 4, 4, torch.bfloat16, True), (128, 3, 2, torch.float16, False), (64, 3, 3, torch.bfloat16, True)],
    ids=lambda case: str(case).replace("torch.", ""),
)
def test_it_compiles_without_spills_and_three_programs_find_room(run_python, monkeypatch, tmp_path, case):
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    head_dim, centred = case[0], case[-1]
    arguments = ", ".join(map(str, case))
    printed = run_python(f"{COMPILE}\nreport({arguments}, {str(tmp_path)!r})").split()
    products, shared_bytes, registers, stack_bytes = map(int, printed)
    # Sixteen input channels a product, and one matrix.
    assert products == head_dim // 16 + centred
    assert stack_bytes == 0, f"{registers} registers do not suffice"
    assert registers * 128 * 3 <= 65536
    assert 3 * (shared_bytes + 1024) <= 228 * 1024
