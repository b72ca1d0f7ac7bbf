"""Qwen3-VL: query and key norms, interleaved mrope, deepstack features, boxes in thousandths of the image."""

from __future__ import annotations

from megavg.models.base import ModelSpec


def _make_rotary(text_config):
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    return Qwen3VLTextRotaryEmbedding(text_config)


def _make_vision_tower(vision_config):
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    return Qwen3VLVisionModel(vision_config)


def _vision_features(tower, pixel_values, image_grid_thw):
    output = tower(pixel_values, grid_thw=image_grid_thw)
    return output.pooler_output, list(output.deepstack_features)


SPEC = ModelSpec(
    family="qwen3_vl", box_format="json_relative_1000", qkv_bias=False, qk_norm=True, make_rotary=_make_rotary,
    make_vision_tower=_make_vision_tower, vision_features=_vision_features)
