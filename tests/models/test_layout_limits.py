"""Layouts that a model cannot be split into are refused before anything is built, with the option to change."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from megavg.models.base import copy_weights, load_model
from megavg.parallel.context import ParallelContext
from megavg.parallel.mcore import check_world_size
from megavg.protocols.options import StageOptions


def context(tensor: int = 1, pipeline: int = 1) -> ParallelContext:
    return ParallelContext(tensor * pipeline, 0, tensor, 0, None, pipeline, 0, None, 1, 0, None, torch.device("cpu"))


@pytest.mark.parametrize("family, fields, layout, message", [
    ("qwen2_5_vl", {"num_heads": 12, "num_kv_heads": 6, "hidden_size": 96}, {"tensor": 4},
     "6 key-value heads .* neither divide by parallel.tensor_model_parallel_size=4 nor divide it"),
    ("qwen3_vl", {}, {"tensor": 3}, "4 attention heads .* not divisible"),
    ("qwen3_vl", {}, {"pipeline": 2},
     "3 decoder layers do not fill .*=2 stages of which the first holds the 3 that deepstack"),
    ("qwen2_5_vl", {}, {"pipeline": 4}, "3 decoder layers do not fill parallel.pipeline_model_parallel_size=4 stages"),
])
def test_refused_layouts(checkpoints, family, fields, layout, message):
    model = load_model(checkpoints(family, **fields))
    with pytest.raises(ValueError, match=message):
        model.build_stage(context(**layout), torch.float32)


def test_world_size_names_the_options():
    with pytest.raises(ValueError, match="world size 6 is not divisible .* 2 \\* 2; change parallel.tensor"):
        check_world_size(6, 2, 2)
    check_world_size(8, 2, 2)


def test_sequence_parallelism_needs_a_gpu(checkpoints):
    model = load_model(checkpoints("qwen3_vl"), StageOptions(sequence_parallel=True))
    with pytest.raises(ValueError, match="parallel.sequence_parallel=true needs a GPU.*set it to false"):
        model.build_stage(context(tensor=2), torch.float32)


def test_a_checkpoint_without_a_tensor_is_refused_also_by_those_who_would_not_read_it(checkpoints, tmp_path):
    from safetensors.torch import load_file, save_file

    source = checkpoints("qwen3_vl")
    copied = shutil.copytree(source, tmp_path / "copied")
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    load_model(source).check_weights()
    with pytest.raises(ValueError, match="tensor model.language_model.norm.weight is missing in .*copied, 1 in all"):
        load_model(copied).check_weights()


def test_given_layers_of_one_stage_must_be_all(checkpoints):
    model = load_model(checkpoints("qwen3_vl"), StageOptions(pipeline_layers=(7,)))
    with pytest.raises(ValueError, match="must be 1 numbers, one a stage, that sum to the model's 3 layers"):
        model.stage_layers(1)


@pytest.mark.parametrize("layers, message", [
    ((2, 2), "must be 2 numbers, one a stage, that sum to the model's 3 layers"),
    ((3,), "must be 2 numbers"),
    ((1, 2), "first stage 1 layers, but deepstack features enter the first 3; give it more"),
])
def test_given_stages_must_fit(checkpoints, layers, message):
    model = load_model(checkpoints("qwen3_vl"), StageOptions(pipeline_layers=layers))
    with pytest.raises(ValueError, match=message):
        model.stage_layers(2)


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
