"""Decoder layers are divided so that the slowest stage is as fast as can be, and evenly beside that."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavg.models.base import load_model
from megavg.models.stage_split import split_layers
from megavg.protocols.options import StageOptions

cases = st.integers(1, 5).flatmap(lambda stages: st.tuples(
    st.lists(st.floats(0.1, 10), min_size=stages + 2, max_size=9), st.just(stages), st.floats(0, 20), st.floats(0, 20),
    st.integers(1, 3)))


def largest(costs, parts, first, last) -> float:
    sums = [sum(costs[i] for i in part) for part in parts]
    sums[0] += first
    sums[-1] += last
    return max(sums)


@settings(deadline=None)
@given(cases)
def test_no_other_cut_has_a_faster_slowest_stage(case):
    costs, stages, first, last, least = case
    parts = split_layers(costs, stages, first, last, least)
    assert [i for part in parts for i in part] == list(range(len(costs)))
    assert len(parts) == stages and all(parts) and len(parts[0]) >= least
    others = [[range(a, b) for a, b in itertools.pairwise((0, *cuts, len(costs)))]
              for cuts in itertools.combinations(range(1, len(costs)), stages - 1)]
    best = min(largest(costs, other, first, last) for other in others if len(other[0]) >= least)
    assert largest(costs, parts, first, last) <= best * (1 + 1e-6)


@pytest.mark.parametrize("num_layers, stages", [(3, 2), (7, 3), (28, 4), (36, 8), (5, 5)])
def test_equal_layers_are_shared_evenly(num_layers, stages):
    sizes = [len(part) for part in split_layers([1.0] * num_layers, stages)]
    assert max(sizes) - min(sizes) <= 1


def test_too_few_layers_are_refused():
    with pytest.raises(ValueError, match="3 layers cannot be divided into 3 stages of which the first holds 2 or more"):
        split_layers([1.0] * 3, 3, least_first=2)


def test_the_vision_tower_takes_layers_off_the_first_stage(checkpoints):
    """... and fewer when it is frozen, which needs no backward, or when there are few image tokens."""
    folder = checkpoints("qwen2_5_vl", num_layers=12, vision_depth=2)

    def first(**options) -> int:
        return len(load_model(folder, StageOptions(**options)).stage_layers(2)[0])

    assert first(image_token_share=0.75) < first(image_token_share=0.75, freeze_vision_tower=True)
    assert first(image_token_share=0.75) < first(image_token_share=0.0) >= 6


def test_deepstack_layers_stay_on_the_first_stage(checkpoints):
    model = load_model(checkpoints("qwen3_vl", num_layers=6, vision_depth=3))
    assert [len(stage) for stage in model.stage_layers(4)] == [3, 1, 1, 1]
