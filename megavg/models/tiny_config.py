"""Translate a tiny checkpoint's sizes into the configuration files that each Qwen-VL family expects."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megavg.models.tiny import TinySpec

SPATIAL_MERGE_SIZE = 2
TEMPORAL_PATCH_SIZE = 2


@dataclass(frozen=True)
class Family:
    """What sets one family apart: patch size in pixels, and mean and deviation of its pixels."""

    patch_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

FAMILIES = {
    "qwen2_vl": Family(14, *_CLIP),
    "qwen2_5_vl": Family(14, *_CLIP),
    "qwen3_vl": Family(16, *_HALF),
}


def model_config(spec: TinySpec, token_ids: dict[str, int]):
    """Build the transformers configuration of ``spec``; ``token_ids`` maps special tokens to ids."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        spec.family,
        text_config=_text_config(spec, token_ids),
        vision_config=_vision_config(spec),
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=spec.tie_embeddings,
        dtype=spec.dtype,
    )


def mrope_section(family: str, head_dim: int) -> list[int]:
    """Split the ``head_dim / 2`` rotary frequencies over time, height and width in the family's own proportion.

    Released models have [16, 24, 24] of 64 (Qwen2-VL, Qwen2.5-VL) and, interleaved, [24, 20, 20] of 64 (Qwen3-VL).
    """
    half = head_dim // 2
    side = half * 20 // 64 if family == "qwen3_vl" else half * 24 // 64
    return [half - 2 * side, side, side]


def preprocessor_config(spec: TinySpec) -> dict:
    """Content of preprocessor_config.json, with the pixel limits under the keys that the family uses."""
    family = FAMILIES[spec.family]
    if spec.family == "qwen3_vl":
        limits = {"size": {"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels}}
    else:
        limits = {"min_pixels": spec.min_pixels, "max_pixels": spec.max_pixels}
    processor_class = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[spec.family]
    return {
        **limits,
        "patch_size": spec.patch_size,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "merge_size": SPATIAL_MERGE_SIZE,
        "image_mean": list(family.image_mean),
        "image_std": list(family.image_std),
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": f"{processor_class}Processor",
    }


def _text_config(spec: TinySpec, token_ids: dict[str, int]) -> dict:
    rope = {"rope_type": "default", "rope_theta": spec.rope_theta,
            "mrope_section": mrope_section(spec.family, spec.head_dim)}
    config = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "initializer_range": spec.initializer_range,
        "bos_token_id": token_ids["<|endoftext|>"],
        "eos_token_id": token_ids["<|im_end|>"],
        # Older readers look here; the outer configuration says the same.
        "tie_word_embeddings": spec.tie_embeddings,
    }
    if spec.family == "qwen3_vl":
        rope["mrope_interleaved"] = True
        config["head_dim"] = spec.head_dim
    else:
        config["max_window_layers"] = spec.num_layers
    return config


def _vision_config(spec: TinySpec) -> dict:
    config = {
        "depth": spec.vision_depth,
        "num_heads": spec.vision_heads,
        "patch_size": spec.patch_size,
        "spatial_merge_size": SPATIAL_MERGE_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "initializer_range": spec.initializer_range,
    }
    if spec.family == "qwen2_vl":
        # Here hidden_size is the width that leaves the tower, and embed_dim the width inside it.
        return config | {"embed_dim": spec.vision_hidden_size, "hidden_size": spec.hidden_size, "mlp_ratio": 4}
    config |= {
        "hidden_size": spec.vision_hidden_size,
        "intermediate_size": 4 * spec.vision_hidden_size,
        "out_hidden_size": spec.hidden_size,
    }
    if spec.family == "qwen2_5_vl":
        # Windows of 2 x 2 merged tokens, so that small pictures have several; full attention in the last block.
        window = 2 * SPATIAL_MERGE_SIZE * spec.patch_size
        return config | {"window_size": window, "fullatt_block_indexes": [spec.vision_depth - 1]}
    side = min(max(math.isqrt(spec.max_pixels) // spec.patch_size, 8), 48)
    taps = list(range(min(3, spec.vision_depth, spec.num_layers)))
    return config | {"num_position_embeddings": side * side, "deepstack_visual_indexes": taps}
