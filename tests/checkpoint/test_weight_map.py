"""The weight map: Hugging Face tensors -> tensor-parallel shards -> Hugging Face tensors, bit by bit."""

from __future__ import annotations

import pytest
import torch

from megavg.checkpoint.weight_map import WeightEntry, WeightMap
from megavg.models.base import load_model
from tests.tiny_models import sharpened


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_round_trip_is_bit_equal(checkpoints, family, tied, tp_size):
    model = load_model(sharpened(checkpoints(family, tie_embeddings=tied)))
    weight_map = model.weight_map(tp_size)
    back = {}
    for entry in weight_map.entries.values():
        tensors = [model.checkpoint.read(name) for name in entry.hf_names]
        shards = [entry.to_megavg(tensors, tp_size, rank) for rank in range(tp_size)]
        assert len({shard.shape for shard in shards}) == 1
        back.update(entry.to_hf(shards))
    assert sorted(back) == sorted(weight_map.hf_names) == model.checkpoint.names
    for name, tensor in back.items():
        assert torch.equal(tensor, model.checkpoint.read(name)), name


def test_padding_rows_are_zeros_on_the_last_rank(checkpoints):
    model = load_model(sharpened(checkpoints("qwen3_vl")))
    for name in ("embedding.weight", "head.weight"):
        entry = model.weight_map(2)[name]
        tensor = model.checkpoint.read(entry.hf_names[0])
        first, last = (entry.to_megavg([tensor], 2, rank) for rank in (0, 1))
        assert tensor.shape[0] == 515 and first.shape[0] == last.shape[0] == 258
        assert torch.equal(torch.cat([first, last])[:515], tensor) and not last[-1].any()


def test_joined_tensors_are_split_each_by_itself():
    """Rank r holds [its part of the first | its part of the second], not a piece of the whole."""
    entry = WeightEntry("qkv", ("q", "k"), 0, (4, 2))
    q, k = torch.arange(4.0)[:, None], 10 + torch.arange(2.0)[:, None]
    assert entry.to_megavg([q, k], 2, 0).flatten().tolist() == [0, 1, 10]
    assert entry.to_megavg([q, k], 2, 1).flatten().tolist() == [2, 3, 11]


def test_split_along_the_second_axis():
    entry = WeightEntry("out", ("o",), 1, (4,))
    whole = torch.arange(12.0).view(3, 4)
    shards = [entry.to_megavg([whole], 2, rank) for rank in (0, 1)]
    assert torch.equal(shards[1], whole[:, 2:]) and shards[1].is_contiguous()
    assert torch.equal(entry.to_hf(shards)["o"], whole)


def test_copies_of_a_head_lie_on_neighbouring_ranks():
    entry = WeightEntry("kv", ("k", "v"), 0, (2, 2), copies=2)
    k, v = torch.tensor([[0.0], [1.0]]), torch.tensor([[10.0], [11.0]])
    shards = [entry.to_megavg([k, v], 4, rank) for rank in range(4)]
    assert [shard.flatten().tolist() for shard in shards] == [[0, 10], [0, 10], [1, 11], [1, 11]]
    back = entry.to_hf(shards)
    assert torch.equal(back["k"], k) and torch.equal(back["v"], v)


def test_wrong_size_names_the_tensor():
    entry = WeightEntry("qkv", ("q", "k"), 0, (4, 2))
    with pytest.raises(ValueError, match="k: expected 2 along axis 0, got shape \\(3, 1\\); config.json and"):
        entry.to_megavg([torch.zeros(4, 1), torch.zeros(3, 1)], 2, 0)


def test_two_entries_of_one_name_are_refused():
    with pytest.raises(ValueError, match="one name"):
        WeightMap([WeightEntry("a", ("x",)), WeightEntry("a", ("y",))])
