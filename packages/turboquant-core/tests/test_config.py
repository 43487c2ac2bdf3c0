import dataclasses

import pytest

from turboquant_core import PRESETS, TurboQuantConfig, VectorFormat
from turboquant_core.testing import MODEL_SHAPES

PRESET_BITS = {
    "tq4": (4, 4),
    "tq3.5": (3.5, 3.5),
    "tq3": (3, 3),
    "tq2.5": (2.5, 2.5),
    "tq2": (2, 2),
    "k6v4": (6, 4),
    "k8v4": (8, 4),
}


@pytest.mark.parametrize("name", PRESET_BITS)
def test_presets_name_the_bits_of_keys_and_values(name):
    config = TurboQuantConfig.preset(name, 128)
    assert (config.key_bits, config.value_bits) == PRESET_BITS[name]
    assert config == TurboQuantConfig(128, *PRESET_BITS[name])


def test_there_are_no_other_presets_and_nobody_can_add_one():
    assert dict(PRESETS) == PRESET_BITS
    with pytest.raises(TypeError):
        PRESETS["tq1"] = (1, 1)


def test_fields_of_a_preset_can_be_replaced():
    config = TurboQuantConfig.preset("tq3", 64, value_bits=2, key_scale="norm", center_keys=False)
    assert config == TurboQuantConfig(64, 3, 2, "norm", "least_squares", False)


def test_defaults_are_four_bits_with_centred_keys():
    assert TurboQuantConfig(128) == TurboQuantConfig(128, 4, 4, "unbiased", "least_squares", True)


@pytest.mark.parametrize(
    ("name", "head_dim", "slot_bytes"),
    [
        ("tq4", 128, 132),
        ("tq3", 128, 100),
        ("tq2", 128, 68),
        ("k6v4", 128, 164),
        ("k8v4", 128, 196),
        ("tq3.5", 128, 120),
        ("tq2.5", 128, 88),
        ("tq4", 80, 84),
    ],
)
def test_bytes_of_a_slot(name, head_dim, slot_bytes):
    config = TurboQuantConfig.preset(name, head_dim)
    assert config.slot_bytes == slot_bytes
    assert config.key_format.nbytes + config.value_format.nbytes == slot_bytes


def test_formats_are_those_of_keys_and_values():
    config = TurboQuantConfig(96, key_bits=3.5, value_bits=2)
    assert config.key_format == VectorFormat(96, 3.5)
    assert config.value_format == VectorFormat(96, 2)


@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=lambda shape: shape.name)
def test_every_model_shape_is_covered(shape):
    for name in ("tq4", "tq3", "tq2", "k6v4", "k8v4"):
        config = TurboQuantConfig.preset(name, shape.head_dim)
        assert config.slot_bytes < 2 * 2 * shape.head_dim


@pytest.mark.parametrize("field", ["key_bits", "value_bits"])
@pytest.mark.parametrize("bits", [0, 1, 7, 9, 4.5])
def test_bits_that_no_cache_stores_are_refused_by_name(field, bits):
    with pytest.raises(ValueError, match=rf"{field} is {bits}; it must be one of ") as caught:
        TurboQuantConfig(128, **{field: bits})
    known = str(caught.value).split(" one of ")[1].split(", ")
    assert sorted(map(float, known)) == [2, 2.5, 3, 3.5, 4, 5, 6, 8]


@pytest.mark.parametrize("field", ["key_scale", "value_scale"])
def test_unknown_scale_rules_are_refused(field):
    with pytest.raises(ValueError, match="'max'; it must be one of norm, unbiased, least_squares"):
        TurboQuantConfig(128, **{field: "max"})


@pytest.mark.parametrize("center_keys", ["no", 0, None])
def test_what_centres_keys_is_true_or_false(center_keys):
    with pytest.raises(ValueError, match=f"center_keys is {center_keys!r}; it must be True or False"):
        TurboQuantConfig(64, center_keys=center_keys)


@pytest.mark.parametrize("head_dim", [0, 100, 520, 64.0, True])
def test_a_head_dim_out_of_range_is_named_with_the_limits(head_dim):
    with pytest.raises(ValueError, match=rf"head_dim is {head_dim}; .* to 512"):
        TurboQuantConfig(head_dim)


@pytest.mark.parametrize("field", ["key_bits", "value_bits"])
def test_fractional_bits_need_quarters_of_whole_bytes(field):
    with pytest.raises(ValueError, match=r"head_dim is 80; 2.5 bits .* multiple of 32"):
        TurboQuantConfig(80, **{field: 2.5})


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"preset is 'tq5'; .* tq4, tq3.5, .* k8v4"):
        TurboQuantConfig.preset("tq5", 128)


def test_a_config_is_a_value():
    assert len({TurboQuantConfig(64), TurboQuantConfig(64), TurboQuantConfig(64, 3)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        TurboQuantConfig(64).key_bits = 3


def test_values_may_have_a_head_dim_of_their_own():
    config = TurboQuantConfig.preset("tq4", 512, value_head_dim=64)
    assert config.head_dims == (512, 64)
    assert (config.key_format, config.value_format) == (VectorFormat(512, 4), VectorFormat(64, 4))
    assert config.slot_bytes == 512 // 2 + 2 + 64 // 2 + 2
    assert not config.has_kernels


def test_the_head_dim_of_keys_is_none_of_their_own():
    assert TurboQuantConfig(64, value_head_dim=64) == TurboQuantConfig(64)
    assert TurboQuantConfig(64).head_dims == (64, 64)
    assert TurboQuantConfig(64, value_head_dim=64).has_kernels
    assert not TurboQuantConfig(64, 2.5, 2.5).has_kernels


@pytest.mark.parametrize("value_head_dim", [0, 20, 1024, 64.0, "64"])
def test_a_head_dim_of_values_that_no_codebook_has_is_refused(value_head_dim):
    with pytest.raises(ValueError, match=f"value_head_dim is {value_head_dim}; it must be a multiple of 8"):
        TurboQuantConfig(64, value_head_dim=value_head_dim)
