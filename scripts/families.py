"""Try TurboQuantCache on a small model of every decoder family that transformers has, and write docs/families.md.

Run without arguments it writes the page; the tests run one family each and compare the page's row.
"""

import os
import sys
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import transformers
from transformers import CONFIG_MAPPING, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from turboquant_hf import TurboQuantCache
from turboquant_hf._compat import with_cache
from turboquant_hf.tools.doctor.attention import model_attention
from turboquant_hf.tools.doctor.engines import by_transformers

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
ATTENTIONS = ("eager", "sdpa", "turboquant")
VOCAB = 300
PROMPT, CHUNKS = 40, (1, 3, 8, 20)
MOST_PARAMETERS = 20_000_000
CACHE: dict[str, Any] = {"key_bits": 8, "value_bits": 8}
# Codes of 8 bits are off by this share of a vector's norm.
NOISE = 0.0065
# A right answer's error is that of such noise; one of another mask, window or layer is several times as large.
MOST_NOISE = 4.0
LEAST_BOUND = 5e-4

HEAD = """# Model families

Every decoder family of transformers {version} that `AutoModelForCausalLM` knows, {all} of them, as a small random
model: logits with `TurboQuantCache` at 8 bits after a prompt and in chunks, against `DynamicCache`. "right" is an
error that noise of 8 bits explains: {right} families are right under at least one attention. {refused} are refused
where the cache is made, with this message. "not offered" is an attention that transformers does not have for the
family. `turboquant doctor` says the same of each.

`python scripts/families.py` writes this page, and the tests compare each row with it.

| family | eager | sdpa | turboquant | |
|---|---|---|---|---|
"""

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    **dict.fromkeys(("n_embd", "d_model", "embed_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "d_inner", "decoder_ffn_dim"), 96),
    "encoder_ffn_dim": 96,
    "n_positions": 512,
    # All experts, so that noise changes no choice.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "n_group": 1,
    "topk_group": 1,
    "is_decoder": True,
}

MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
LINEAR_FIRST = {"layer_types": ["linear_attention", "full_attention"]}
SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16}
PER_LAYER_INPUT = {"vocab_size_per_layer_input": VOCAB, "layer_types": ["sliding_attention", "full_attention"] * 2}
SPARSE = MLA | {"head_dim": 32, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 16}
SMALL_BLT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
SMALL_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
INDEXED = {
    "layer_types": ["linear_attention", "full_attention"],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
ONE_CODEBOOK = {"num_codebooks": 1}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
    "gemma3n": SHARED | PER_LAYER_INPUT | {"laurel_rank": 8, "activation_sparsity_pattern": None},
    "gemma3n_text": SHARED | PER_LAYER_INPUT | {"laurel_rank": 8, "activation_sparsity_pattern": None},
    "gemma4": SHARED | PER_LAYER_INPUT | {"global_head_dim": 32, "attention_k_eq_v": True},
    "gemma4_text": SHARED | PER_LAYER_INPUT | {"global_head_dim": 32, "attention_k_eq_v": True},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 4, "num_mem_blocks": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"), LINEAR_FIRST),
    "blt": {
        "vocab_size": 260,
        "encoder_hash_byte_group_vocab": 64,
        **dict.fromkeys(("patcher_config", "global_config"), SMALL_BLT),
        **{part: SMALL_BLT | {"hidden_size_global": 64} for part in ("encoder_config", "decoder_config")},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
        "sliding_window": 16,
    },
    "cpmant": {"dim_head": 16, "dim_ff": 96},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 4},
    },
    "dots1": {"n_shared_experts": 1},
    "git": {"vision_config": SMALL_TOWER | {"image_size": 32}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "mllama": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "musicgen": ONE_CODEBOOK,
    "musicgen_melody": ONE_CODEBOOK,
    "phi4_multimodal": {
        "vision_config": SMALL_TOWER | {"image_size": 32, "crop_size": 32},
        "audio_config": SMALL_TOWER | {"num_blocks": 1},
    },
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), INDEXED),
    "prophetnet": {"num_decoder_layers": 2, "num_decoder_attention_heads": 4, "num_encoder_layers": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        # The second has the first one's weights.
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "head_dim": 32,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 4,
    },
    "zaya": {"num_experts": 1, "num_experts_per_tok": 1, "router_hidden_size": 16},
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), MLA | LINEAR_FIRST),
    **dict.fromkeys(("axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4"), SPARSE),
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), MLA),
    "longcat_flash": MLA | {"head_dim": 16},
}
# Given the text from its beginning at every call, of which the cache spares the computation.
WHOLE_TEXT = ("cpmant",)
# Not more than one token after a prompt.
TOKEN_BY_TOKEN = ("prophetnet",)
NOT_TRIED = dict.fromkeys(
    ("gemma4_assistant", "gemma4_unified_assistant"),
    "drafts for another model, whose keys and values it is given; it has no cache of its own",
)
"""Families that are not in the table, each with the reason."""


@dataclass(frozen=True)
class Row:
    """What came of one family.

    Attributes:
        family: Model type.
        results: "right", "refused" or "not offered" under each of `ATTENTIONS`.
        reason: Why it is refused; empty where it is not.
    """

    family: str
    results: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"| {self.family} | {' | '.join(self.results)} | {self.reason} |"

    @classmethod
    def read(cls, line: str) -> "Row":
        """The row of a line of the page."""
        family, *results, reason = (cell.strip() for cell in line.strip("|").split("|"))
        return cls(family, tuple(results), reason)


def configuration(family: str) -> Any:
    """A small configuration of a family's text model."""
    kind = type(CONFIG_MAPPING[family]().get_text_config(decoder=True))
    named = {each.name for each in fields(kind)} | set(kind.attribute_map)
    return kind(**{name: value for name, value in SMALL.items() if name in named} | OVERRIDES.get(family, {}))


def tokens(num_tokens: int) -> torch.Tensor:
    """int64 [2, num_tokens], the same at every call."""
    return torch.randint(5, VOCAB - 50, (2, num_tokens), generator=torch.Generator().manual_seed(num_tokens))


def step_logits(model: Any, cache: Any, noise: float = 0.0) -> torch.Tensor:
    """Logits [2, num_tokens, vocab_size] of chunks after a prompt, with noise on what is stored of the prompt."""
    logits = []
    with torch.no_grad():
        model(tokens(PROMPT), **with_cache(cache))
        for layer in cache.layers if noise else []:
            for name in ("keys", "values"):
                states = getattr(layer, name, None)
                if states is not None:
                    spread = noise * states.norm(dim=-1, keepdim=True) / states.shape[-1] ** 0.5
                    setattr(layer, name, states + spread * torch.randn_like(states))
        text = tokens(PROMPT)
        for size in CHUNKS if model.config.model_type not in TOKEN_BY_TOKEN else [1] * len(CHUNKS):
            chunk = tokens(size)
            text = torch.cat([text, chunk], dim=1)
            given = text if model.config.model_type in WHOLE_TEXT else chunk
            logits.append(model(given, **with_cache(cache)).logits)
    return torch.cat(logits, dim=1)


def error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The median over tokens of the relative error; a NaN counts as infinite."""
    errors = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(errors.nan_to_num(torch.inf).median())


def build(family: str) -> Any:
    """A small model, with weights that let attention matter."""
    config = configuration(family)
    # The text models of some families are causal models only by the family's name.
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) or getattr(
        transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    )
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in kind._from_config(config).parameters())
    assert count < MOST_PARAMETERS, f"{family} has {count:,} parameters; give it a smaller configuration"
    torch.manual_seed(0)
    return kind._from_config(config, attn_implementation="eager").eval()


def check_refusal(family: str, model: Any, message: str) -> str:
    """The message, which has to say what is refused and what to do."""
    named = (family, model.config.model_type, type(model).__name__)
    assert any(name in message for name in named), f"the refusal of {family} does not name it: {message}"
    assert any(f" {word} " in f" {message}" for word in ("Use", "Run")), (
        f"{family} is refused without a remedy: {message}"
    )
    return message


def try_family(family: str) -> Row:
    """Run a family under every attention.

    Raises:
        AssertionError: If an answer is neither right nor refused by name with a remedy, or doctor says something else.
    """
    model = build(family)
    config = model.config
    try:
        cache = TurboQuantCache(config, **CACHE)
    except ValueError as refusal:
        assert not _doctor(config), f"doctor says that {family} is served"
        return Row(family, ("refused",) * len(ATTENTIONS), check_refusal(family, model, str(refusal)))
    expected = step_logits(model, DynamicCache(config=config))
    torch.manual_seed(1)
    bound = MOST_NOISE * error(step_logits(model, DynamicCache(config=config), NOISE), expected) + LEAST_BOUND
    results, reason = [], ""
    for attention in ATTENTIONS:
        try:
            model.set_attn_implementation(attention)
        except ValueError:
            results.append("not offered")
            continue
        if config._attn_implementation != attention:
            # As when it is loaded so.
            config._attn_implementation = attention
            if attention != "turboquant":
                results.append("not offered")
                continue
        cache = TurboQuantCache(config, **CACHE)
        try:
            found = error(step_logits(model, cache), expected)
        except (ValueError, RuntimeError) as refusal:
            if attention != "turboquant":
                raise AssertionError(f"{family} under {attention}: {refusal}") from refusal
            reason = check_refusal(family, model, str(refusal))
            results.append("refused")
            continue
        assert found < bound, f"{family} under {attention} is {found:.4f} off, and noise explains {bound:.4f}"
        served = cache
        results.append("right")
    shapes = {layer.index: layer for layer in model_attention(config).layers}
    stores = {index: layer.store for index, layer in enumerate(served.layers) if hasattr(layer, "store")}
    assert stores, f"no layer of {family} stores codes"
    for index, store in stores.items():
        shape = shapes[index]
        assert (shape.head_dim, shape.value_head_dim) == store.config.head_dims, f"layer {index} of {family}"
        assert shape.num_kv_heads == store.num_kv_heads, f"layer {index} of {family}"
    expected_paths = {
        "fused" if results[-1] == "right" and store.pages.has_kernel else "dequantised" for store in stores.values()
    }
    found_paths = _doctor(config)
    assert found_paths == expected_paths, f"doctor says {found_paths} of {family}, which is {results[-1]}"
    return Row(family, tuple(results), reason)


def _doctor(config: Any) -> set[Any]:
    """How `turboquant doctor` says that layers are served; empty for a model that is not."""
    try:
        attention = model_attention(config)
    except ValueError:
        return set()
    return {path.path for path in by_transformers(config, attention, "tq4", (9, 0)).layers} - {"uncompressed"}


def families() -> list[str]:
    """Every decoder family that this version of transformers has, but for those not tried."""
    return sorted(
        name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING and name not in NOT_TRIED
    )


def page(rows: list[Row]) -> str:
    """The page, with a table of all families."""
    count = sum("right" in row.results for row in rows)
    refused = sum(set(row.results) == {"refused"} for row in rows)
    head = HEAD.format(version=transformers.__version__, all=len(rows), right=count, refused=refused)
    table = "".join(f"{row}\n" for row in rows)
    return f"{head}{table}\nNot in the table:\n\n" + "".join(f"- {name}: {why}.\n" for name, why in NOT_TRIED.items())


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = []
    for name in sys.argv[1:] or families():
        found.append(try_family(name))
        print(found[-1], flush=True)
    if not sys.argv[1:]:
        PAGE.write_text(page(found), encoding="utf-8")
