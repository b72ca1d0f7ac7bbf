"""Qwen2-VL: full attention in the vision tower, boxes in thousandths of the image between box tokens."""

from __future__ import annotations

from megavg.models.base import ModelSpec


def _make_rotary(text_config):
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

    return Qwen2VLRotaryEmbedding(text_config)


def _make_vision_tower(vision_config):
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    return Qwen2VisionTransformerPretrainedModel(vision_config)


def _vision_features(tower, pixel_values, image_grid_thw):
    return tower(pixel_values, grid_thw=image_grid_thw).pooler_output, []


SPEC = ModelSpec(
    family="qwen2_vl", box_format="tokens_relative_1000", qkv_bias=True, qk_norm=False, make_rotary=_make_rotary,
    make_vision_tower=_make_vision_tower, vision_features=_vision_features)
