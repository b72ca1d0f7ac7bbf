"""NoisyRollout on a small real policy: the annealed noise, the make-up of the groups, and chance."""

from __future__ import annotations

import math

import pytest
import torch

from megavg.algorithms.grpo import GRPO
from megavg.algorithms.noisy_rollout import NoisyRollout
from megavg.ops.perturb import perturb
from megavg.protocols.config import ConfigError, build
from megavg.protocols.options import Perturbation
from megavg.trainer.step import make_signal
from tests.algorithms.toy_explorer import LAYOUT, ToyExplorer, prompts_of
from tests.rollout_batches import random_batch

IMAGES = (6, 0, 9)


def explorer_of(group_size: int = 6) -> ToyExplorer:
    return ToyExplorer(prompts_of(IMAGES), group_size)


def slow_step(start: float, midpoint: float, steepness: float, progress: float) -> float:
    return start * (1 - 1 / (1 + math.exp(-steepness * (progress - midpoint))))


@pytest.mark.parametrize("options", [{}, {"diffusion_step": 300, "midpoint": 0.6, "steepness": 10.0}])
def test_the_noise_is_annealed(options):
    config = NoisyRollout.Config(**options)
    method = NoisyRollout(config)
    steps = [method.noise_step(t / 60) for t in range(61)]
    for t, step in enumerate(steps):
        exact = slow_step(config.diffusion_step, config.midpoint, config.steepness, t / 60)
        assert exact - 1 - 1e-6 < step <= exact + 1e-6
    assert steps == sorted(steps, reverse=True)


def test_the_published_run():
    method = NoisyRollout(NoisyRollout.Config())
    assert [method.noise_step(t / 60) for t in (0, 20, 60)] == [499, 250, 0]
    assert NoisyRollout(NoisyRollout.Config(steepness=1e6)).noise_step(1.0) == 0  # no overflow


@pytest.mark.parametrize("group_size, num_clean, expected", [(6, None, 3), (5, None, 2), (6, 4, 4)])
def test_the_group_is_clean_answers_first_and_then_the_noisy(group_size, num_clean, expected):
    explorer = explorer_of(group_size)
    method = NoisyRollout(NoisyRollout.Config(num_clean=num_clean))
    found = method.explore(explorer, 0.2)
    step = int(slow_step(500, 1 / 3, 30, 0.2))
    assert method.metrics == {"noisy_rollout/diffusion_step": step}
    plain = explorer.sample(group_size)
    changed = 0
    for p, prompt in enumerate(explorer.prompts):
        noisy = perturb(prompt.pixel_values, LAYOUT, Perturbation("diffusion", diffusion_step=step),
                        explorer.generator(p, "noisy_rollout"))
        scores, mask = explorer.scored([found[p]], [prompt.pixel_values])
        noisy_scores, _ = explorer.scored([found[p]], [noisy])
        for i, answer in enumerate(found[p]):
            on_clean = i < expected or not IMAGES[p]
            assert answer.on_clean == on_clean
            own = (scores if on_clean else noisy_scores).logprobs[i][mask[i]]
            assert torch.allclose(answer.logprobs, own, atol=1e-5)
            assert not on_clean or answer.tokens == plain[p][i].tokens
            changed += answer.tokens != plain[p][i].tokens
    assert changed
    again = method.explore(explorer, 0.2)
    assert [[a.tokens for a in group] for group in found] == [[a.tokens for a in group] for group in again]


def test_below_one_step_it_is_grpo():
    explorer = explorer_of()
    method = NoisyRollout(NoisyRollout.Config())
    found = method.explore(explorer, 0.9)
    plain = GRPO(GRPO.Config()).explore(explorer, 0.9)
    assert method.metrics == {"noisy_rollout/diffusion_step": 0.0}
    assert [[(a.tokens, a.on_clean) for a in group] for group in found] == \
        [[(a.tokens, True) for a in group] for group in plain]
    batch, stats = random_batch(3)
    ours, theirs = (make_signal(m, batch, stats, None, 0.5) for m in (method, GRPO(GRPO.Config())))
    for name in ("advantages", "weights", "coefficients", "entropy_weights"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_what_is_asked_of_the_model_never_depends_on_the_prompts():
    calls = []
    for images in ((6, 9), (0, 0)):
        explorer = ToyExplorer(prompts_of(images), 6)
        NoisyRollout(NoisyRollout.Config()).explore(explorer, 0.1)
        calls.append(explorer.calls)
    assert calls[0] == calls[1] == [("sample", 3, 0), ("sample", 3, 3)]


def test_options():
    for wrong in ({"diffusion_step": 1000}, {"diffusion_step": -1}, {"steepness": -1.0}, {"num_clean": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            build(NoisyRollout.Config, wrong, "algorithm")
    with pytest.raises(ValueError, match="num_clean=7.*group_size=6"):
        NoisyRollout(NoisyRollout.Config(num_clean=7)).check(6, 9)
