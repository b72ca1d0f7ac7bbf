"""Positions of text and images: equal to transformers' own for every family, and loud about wrong counts."""

from __future__ import annotations

import pytest
import torch

from megavg.models.layers.mrope import mrope_positions, next_position
from megavg.models.tiny import TinySpec
from megavg.models.tiny_config import FAMILIES, model_config
from megavg.models.tiny_tokenizer import SPECIAL_TOKENS

IMAGE = 400 + SPECIAL_TOKENS.index("<|image_pad|>")
TOKEN_IDS = {token: 400 + index for index, token in enumerate(SPECIAL_TOKENS)}

CASES = {
    "text only": ([5, 6, 7, 8], []),
    "one image": ([1, 2] + [IMAGE] * 6 + [3, 4, 5], [(1, 4, 6)]),
    "image first": ([IMAGE] * 4 + [9], [(1, 4, 4)]),
    "image last": ([9, 9, 9] + [IMAGE] * 10, [(1, 10, 4)]),
    "three images": (
        [1] + [IMAGE] * 3 + [2, 3] + [IMAGE] * 20 + [4] + [IMAGE] + [5, 6], [(1, 2, 6), (1, 8, 10), (1, 2, 2)]
    ),
}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def hf_model(request):
    from transformers import AutoModelForImageTextToText

    spec = TinySpec(request.param, hidden_size=32, num_layers=1, vision_depth=1, vision_heads=2)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(model_config(spec, TOKEN_IDS)).model


@pytest.mark.parametrize("case", CASES)
def test_equal_to_transformers(hf_model, case):
    ids, grids = CASES[case]
    batch = torch.tensor([ids])
    expected, deltas = hf_model.get_rope_index(
        batch, mm_token_type_ids=(batch == IMAGE).int(), image_grid_thw=torch.tensor(grids) if grids else None
    )
    positions = mrope_positions(ids, IMAGE, grids, spatial_merge_size=2)
    assert positions.dtype == torch.int64
    assert torch.equal(positions, expected[:, 0])
    assert next_position(positions) == len(ids) + int(deltas[0])


def test_image_positions_by_hand():
    positions = mrope_positions(torch.tensor([7, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 8]), IMAGE, [(1, 4, 6)], 2)
    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]


def test_images_without_text_between():
    positions = mrope_positions([IMAGE] * 8, IMAGE, [(1, 4, 4), (1, 4, 4)], 2)
    assert positions[:, :4].tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]]
    assert torch.equal(positions[:, 4:], positions[:, :4] + 2)


def test_empty_sequence_starts_at_zero():
    positions = mrope_positions([], IMAGE, [], 2)
    assert positions.shape == (3, 0)
    assert next_position(positions) == 0


@pytest.mark.parametrize("ids, grids, message", [
    ([1] + [IMAGE] * 9, [(1, 6, 8)], "image tokens 9, grid says 12"),
    ([IMAGE] * 4, [], "image tokens 4, grid says 0"),
    ([1, 2], [(1, 4, 4)], "image tokens 0, grid says 4"),
    ([IMAGE] * 2 + [1] + [IMAGE] * 2, [(1, 4, 4)], "in a row"),
    ([IMAGE] * 2 + [1] + [IMAGE] * 4, [(1, 4, 4), (1, 2, 4)], "order of the images"),
    ([IMAGE] * 6, [(1, 5, 6)], "not divisible by the spatial merge size 2"),
    ([IMAGE] * 8, [(2, 4, 4)], "only still images"),
])
def test_wrong_counts_are_refused(ids, grids, message):
    with pytest.raises(ValueError, match=message):
        mrope_positions(ids, IMAGE, grids, 2)


def test_a_batch_is_refused():
    with pytest.raises(ValueError, match="one sequence"):
        mrope_positions(torch.zeros(2, 3, dtype=torch.int64), IMAGE, [], 2)
