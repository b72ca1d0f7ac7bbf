"""Advantages inside a group against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megavg.ops.grouped import group_advantages


@pytest.mark.parametrize("group_size, num_groups", [(2, 7), (3, 5), (8, 1)])
@pytest.mark.parametrize("normalize_std", [True, False])
def test_equal_to_numpy(group_size, num_groups, normalize_std):
    rewards = np.random.default_rng(3).random((num_groups, group_size))
    expected = rewards - rewards.mean(1, keepdims=True)
    if normalize_std:
        expected /= rewards.std(1, ddof=1, keepdims=True) + 1e-4
    found = group_advantages(torch.from_numpy(rewards).view(-1), group_size, normalize_std, 1e-4)
    assert found.dtype == torch.float64 and np.allclose(found.numpy(), expected.reshape(-1), atol=1e-14)


def test_rows_of_a_group_are_neighbours():
    found = group_advantages(torch.tensor([1.0, 3.0, 10.0, 20.0]), 2, False, 1e-4)
    assert found.tolist() == [-1.0, 1.0, -5.0, 5.0]


@given(st.floats(-10, 10, width=32), st.integers(1, 17), st.booleans())
@settings(deadline=None, max_examples=60)
def test_equal_rewards_give_exactly_zero(reward, group_size, normalize_std):
    rewards = torch.full((3 * group_size,), reward)
    assert (group_advantages(rewards, group_size, normalize_std, 1e-4) == 0).all()


def test_only_the_equal_group_is_zero():
    found = group_advantages(torch.tensor([0.1] * 3 + [0.1, 0.1, 0.4]), 3, True, 1e-4)
    assert (found[:3] == 0).all() and found[5] > 1


@given(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4))
@settings(deadline=None, max_examples=60)
def test_sum_of_a_group_is_zero_and_nothing_is_infinite(rewards):
    found = group_advantages(torch.tensor(rewards), 4, True, 1e-4)
    assert found.isfinite().all() and abs(float(found.sum())) < 1e-3


@pytest.mark.parametrize("group_size", [4, 0, -3])
def test_a_group_size_that_does_not_fit(group_size):
    with pytest.raises(ValueError, match=f"6 rewards do not make whole groups of group_size={group_size}"):
        group_advantages(torch.rand(6), group_size, True, 1e-4)


def test_inputs_are_not_changed():
    rewards = torch.rand(6)
    before = rewards.clone()
    group_advantages(rewards, 3, True, 1e-4)
    assert torch.equal(rewards, before)
