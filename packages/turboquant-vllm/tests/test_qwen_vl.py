"""vLLM's engine with a small random Qwen3-VL: images, three-dimensional positions, visual features in deeper layers."""

import json

import pytest
import torch

COLOURS = ["red", "blue"]
VISION = "<|vision_start|> <|image_pad|> <|vision_end|> "
IMAGES = [{"prompt": VISION + " ".join(f"t{n}" for n in range(40, 240, 3)), "image": colour} for colour in COLOURS]
CHUNKS = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
EIGHT_BITS = {
    "attention_backend": "CUSTOM",
    "additional_config": {"turboquant": {"key_bits": 8, "value_bits": 8}},
}


@pytest.fixture(scope="module")
def qwen_vl(tiny_sizes, save_words, tmp_path_factory):
    """A folder with the model, its processors, and a tokenizer of words."""
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("Qwen3VL")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12], "mrope_interleaved": True}
    patches = {"patch_size": 8, "temporal_patch_size": 2}
    config = transformers.Qwen3VLConfig(
        # vLLM 0.29 looks for the architecture here, too.
        text_config={**tiny_sizes, "rope_parameters": rope, "architectures": ["Qwen3ForCausalLM"]},
        vision_config={
            **patches,
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": tiny_sizes["hidden_size"],
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        vision_start_token_id=496,
        vision_end_token_id=497,
        image_token_id=498,
        video_token_id=499,
    )
    model = transformers.Qwen3VLForConditionalGeneration(config)
    for name, weights in model.named_parameters():
        if weights.ndim > 1 and "visual" in name:
            # Large enough for the colour of an image to matter.
            torch.nn.init.normal_(weights, std=0.1)
    model.save_pretrained(folder)
    save_words(folder, ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    common = {
        **patches,
        "merge_size": 2,
        "size": {"shortest_edge": 16**2, "longest_edge": 64**2},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "processor_class": "Qwen3VLProcessor",
    }
    processors = {"image": "Qwen2VLImageProcessorFast", "video": "Qwen3VLVideoProcessor"}
    for kind, name in processors.items():
        file = folder / ("preprocessor_config.json" if kind == "image" else "video_preprocessor_config.json")
        file.write_text(json.dumps({**common, f"{kind}_processor_type": name}))
    return folder


def test_images(generate, qwen_vl, with_torchvision, itemsize, assert_near):
    only_images = {"limit_mm_per_prompt": {"image": 1, "video": 0}}
    tiny = {"model": qwen_vl, "max_tokens": 30, **CHUNKS, **only_images, "env": with_torchvision}
    expected = generate(IMAGES, **tiny)
    # The prompts differ in their image alone.
    assert expected["tokens"][0][0] != expected["tokens"][0][1]
    found = generate(IMAGES, **tiny, forced=expected["tokens"][0], **EIGHT_BITS)
    assert_near(found, expected)
    assert found["kv_tokens"] / expected["kv_tokens"] == pytest.approx(128 * itemsize / 132, rel=0.02)
