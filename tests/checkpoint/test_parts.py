"""Flat runs of shards are boxes of whole tensors: every number is held where it belongs, and owned once."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megavg.checkpoint.parts import boxes, parts_of_run
from megavg.checkpoint.weight_map import WeightEntry
from megavg.models.base import load_model

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def cut(tensor: torch.Tensor, offsets, sizes) -> torch.Tensor:
    for axis, (offset, size) in enumerate(zip(offsets, sizes)):
        tensor = tensor.narrow(axis, offset, size)
    return tensor


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_boxes_are_the_run_in_order(shape, data):
    count = math.prod(shape)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    array = torch.arange(count).view(shape)
    found = boxes(shape, start, stop)
    assert [n for box in found for n in cut(array, *box).flatten().tolist()] == list(range(start, stop))
    assert len(found) <= 2 * len(shape) - 1


def runs(shard: torch.Tensor, dp_size: int):
    """(start, values) of each data-parallel rank, as ZeRO-3 cuts the flat shard; ranks of padding alone left out."""
    size = -(-shard.numel() // dp_size)
    for start in range(0, shard.numel(), size):
        yield start, shard.flatten()[start:start + size]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_is_held_where_it_belongs_and_owned_once(checkpoints, family, tied):
    """515 tokens divide by no size and 2 key-value heads have copies under TP4."""
    model = load_model(checkpoints(family, num_layers=2, vision_depth=2, tie_embeddings=tied))
    for tp_size, dp_size in itertools.product((1, 2, 4), (1, 3)):
        owned = defaultdict(int)
        for entry in model.weight_map(tp_size).entries.values():
            if tied and entry.name == "head.weight":
                continue
            whole = [model.checkpoint.read(name).float() for name in entry.hf_names]
            for tp_rank in range(tp_size):
                shard = entry.to_megavg(whole, tp_size, tp_rank)
                for start, values in runs(shard, dp_size):
                    first = tp_rank % (tp_size if entry.axis is None else entry.copies) == 0
                    for part in parts_of_run(entry, shard.shape, start, {"weights": values}, tp_size, tp_rank, first):
                        expected = whole[entry.hf_names.index(part.name.removeprefix("weights/"))]
                        assert part.shape == expected.shape
                        assert torch.equal(part.fetch(), cut(expected, part.offsets, part.sizes))
                        owned[part.name] += part.owned * math.prod(part.sizes)
        assert owned == {f"weights/{name}": math.prod(model.checkpoint.facts(name)[0])
                         for name in model.weight_map(1).hf_names}


def test_parts_are_views_that_can_be_filled():
    entry = WeightEntry("qkv", ("q", "k"), 0, (4, 2))
    run = torch.zeros(5)
    for part in parts_of_run(entry, (6, 2), 6, {"weights": run}, 1, 0, True):
        part.fetch().fill_({"weights/q": 1.0, "weights/k": 2.0}[part.name])
    assert run.tolist() == [1.0, 1.0, 2.0, 2.0, 2.0]
