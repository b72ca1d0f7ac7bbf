"""Layouts that a model cannot be split into are refused before anything is built, with the option to change."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megavg.models.base import copy_weights, load_model
from megavg.models.layers.stage import layer_range
from megavg.parallel.context import ParallelContext
from megavg.parallel.mcore import check_world_size


def context(tensor: int = 1, pipeline: int = 1) -> ParallelContext:
    return ParallelContext(tensor * pipeline, 0, tensor, 0, None, pipeline, 0, None, 1, 0, None, torch.device("cpu"))


@pytest.mark.parametrize("family, fields, layout, message", [
    ("qwen3_vl", {}, {"tensor": 4}, "2 key-value heads .* not divisible by parallel.tensor_model_parallel_size=4"),
    ("qwen3_vl", {}, {"tensor": 3}, "4 attention heads .* not divisible"),
    ("qwen3_vl", {}, {"pipeline": 2}, "first 3 layers, but the first of 2 stages holds 1 of 3"),
    ("qwen2_5_vl", {"tie_embeddings": True}, {"pipeline": 2}, "ties embedding and head"),
])
def test_refused_layouts(checkpoints, family, fields, layout, message):
    model = load_model(checkpoints(family, **fields))
    with pytest.raises(ValueError, match=message):
        model.build_stage(context(**layout), torch.float32)


def test_world_size_names_the_options():
    with pytest.raises(ValueError, match="world size 6 is not divisible .* 2 \\* 2; change parallel.tensor"):
        check_world_size(6, 2, 2)
    check_world_size(8, 2, 2)


@pytest.mark.parametrize("num_layers, pp_size", [(3, 2), (7, 3), (28, 4), (2, 2), (5, 5)])
def test_stages_share_all_layers_evenly(num_layers, pp_size):
    parts = [layer_range(num_layers, pp_size, rank) for rank in range(pp_size)]
    assert [layer for part in parts for layer in part] == list(range(num_layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_weights_that_do_not_fit_are_refused():
    stage = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match="weight: expected shape \\(2, 3\\), got \\(3, 3\\)"):
        copy_weights(stage, iter([("weight", torch.zeros(3, 3))]))
    with pytest.raises(ValueError, match="no weights were given for bias"):
        copy_weights(stage, iter([("weight", torch.zeros(2, 3))]))


def test_config_of_another_model_is_refused(checkpoints):
    model = load_model(checkpoints("qwen3_vl"))
    wrong = dataclasses.replace(model, dims=dataclasses.replace(model.dims, intermediate_size=96))
    entry = wrong.weight_map(1)["layers.0.feed_forward.gate_up.weight"]
    tensors = [wrong.checkpoint.read(name) for name in entry.hf_names]
    with pytest.raises(ValueError, match="gate_proj.weight: expected 96 along axis 0, got shape \\(128, 64\\)"):
        entry.to_megavg(tensors, 1, 0)
