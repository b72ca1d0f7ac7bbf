"""DAPO and Dr. GRPO against plain loops: punishment of length, clip, advantages and who a sum is divided by."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megavg.algorithms.dapo import DAPO
from megavg.algorithms.dr_grpo import DrGRPO
from megavg.algorithms.grpo import GRPO
from megavg.protocols.config import ConfigError, build
from tests.algorithms.slow_losses import Plain, assert_equals_loops, group_advantages, moved
from tests.rollout_batches import random_batch


def slow_dapo(plain: Plain, cache: int) -> float:
    rewards = list(plain.rewards)
    for b, length in enumerate(plain.lengths):
        if cache and length > plain.limit - cache:
            rewards[b] -= (length - (plain.limit - cache)) / cache
    plain.advantages = group_advantages(rewards, plain.group_size)
    return plain.loss(lambda b, t: plain.clipped(b, t, 0.2, 0.28), "token_mean")


def slow_dr_grpo(plain: Plain) -> float:
    plain.advantages = group_advantages(plain.rewards, plain.group_size, normalize_std=False)
    return plain.loss(plain.clipped, "constant")


@pytest.mark.parametrize("cache", [0, 3, 7])
def test_dapo_equals_loops(cache):
    batch, stats = random_batch(2, dtype=torch.float64)
    new = moved(stats, batch.mask, 0.3)
    ratio = (new.logprobs - stats.logprobs).exp()[batch.mask]
    assert min((ratio < 0.8).sum(), ((ratio > 1.2) & (ratio < 1.28)).sum(), (ratio > 1.28).sum()) > 1
    assert_equals_loops(lambda: DAPO(DAPO.Config(overlong_cache=cache)), batch, stats, new,
                        lambda plain: slow_dapo(plain, cache))


def test_dr_grpo_equals_loops():
    batch, stats = random_batch(3, dtype=torch.float64)
    batch = replace(batch, max_new_tokens=30)  # more than the longest answer of the batch
    assert_equals_loops(lambda: DrGRPO(DrGRPO.Config()), batch, stats, moved(stats, batch.mask, 0.3), slow_dr_grpo)


def test_one_token_and_equal_groups():
    batch, stats = random_batch(0, num_prompts=1, group_size=2, width=1, dtype=torch.float64)
    new = moved(stats, batch.mask, 0.3)
    assert_equals_loops(lambda: DAPO(DAPO.Config()), batch, stats, new, lambda plain: slow_dapo(plain, 0))
    batch = replace(batch, rewards=torch.ones(2, dtype=torch.float64))
    for algorithm in (DAPO(DAPO.Config()), DrGRPO(DrGRPO.Config())):
        assert (algorithm.advantages(batch, stats) == 0).all()


def test_punishment_by_hand():
    batch, _ = random_batch()
    lengths = torch.tensor([1, 80, 81, 90, 100])
    batch = replace(batch, mask=torch.arange(100)[None] < lengths[:, None], rewards=torch.ones(5), max_new_tokens=100)
    assert DAPO(DAPO.Config(overlong_cache=20)).rewards(batch).tolist() == pytest.approx([1, 1, 0.95, 0.5, 0])
    assert torch.equal(DAPO(DAPO.Config()).rewards(batch), batch.rewards)


def test_a_cache_beyond_the_limit_is_refused():
    batch, _ = random_batch()
    with pytest.raises(ValueError, match="overlong_cache=8 is more than rollout.max_new_tokens=7"):
        DAPO(DAPO.Config(overlong_cache=8)).check(4, 7)


def test_resampling_is_bounded_and_only_dapo_asks_for_it():
    assert DAPO(DAPO.Config(resample_tries=3)).resampling_tries == 3
    assert DAPO(DAPO.Config()).resampling_tries == 10 and GRPO(GRPO.Config()).resampling_tries == 0


@pytest.mark.parametrize("name", ["resample_tries", "overlong_cache"])
def test_negative_options_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name}=-1 must not be negative"):
        build(DAPO.Config, {name: -1}, "algorithm")
