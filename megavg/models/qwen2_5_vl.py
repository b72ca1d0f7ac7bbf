"""Qwen2.5-VL: window attention in the vision tower, boxes in pixels of the resized image."""

from __future__ import annotations

from megavg.models.base import ModelSpec


def _make_rotary(text_config):
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

    return Qwen2_5_VLRotaryEmbedding(text_config)


def _make_vision_tower(vision_config):
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    return Qwen2_5_VisionTransformerPretrainedModel(vision_config)


def _vision_features(tower, pixel_values, image_grid_thw):
    return tower(pixel_values, grid_thw=image_grid_thw).pooler_output, []


SPEC = ModelSpec(
    family="qwen2_5_vl", box_format="json_resized_px", qkv_bias=True, qk_norm=False, make_rotary=_make_rotary,
    make_vision_tower=_make_vision_tower, vision_features=_vision_features)
