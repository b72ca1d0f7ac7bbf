"""ECVGPO against a slow implementation in double precision, its bounds, its closed loop and the sign law."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from megavg.algorithms.ecvgpo import ECVGPO
from megavg.algorithms.grpo import GRPO
from megavg.protocols.batch import PolicySignal, RolloutBatch, TokenScores
from megavg.protocols.config import ConfigError, build
from tests.rollout_batches import on_threads, random_batch, rows_of

FORMS = ("linear", "power", "exponential")
LEVELS = ("token", "sequence", "answer")
VARIANTS = list(itertools.product(FORMS, LEVELS))


def slow_advantages(batch: RolloutBatch, stats: TokenScores, plain: torch.Tensor,
                    c: ECVGPO.Config) -> list[list[float]]:
    """The definition read literally, in Python's double precision; ``plain`` are GRPO's advantages."""
    rows, width = batch.mask.shape
    valid = [[bool(batch.mask[b, t]) for t in range(width)] for b in range(rows)]
    surprise = [[-float(stats.logprobs[b, t]) for t in range(width)] for b in range(rows)]
    if c.level == "sequence":
        for b in range(rows):
            own = [surprise[b][t] for t in range(width) if valid[b][t]]
            surprise[b] = [math.fsum(own) / len(own)] * width
    out = [[float(plain[b, t]) for t in range(width)] for b in range(rows)]
    chosen = [(b, t) for b in range(rows) for t in range(width) if valid[b][t] and out[b][t] > 0
              and (c.level != "answer" or bool(batch.answer_mask[b, t]))]
    mean = math.fsum(surprise[b][t] for b, t in chosen) / len(chosen)
    weights = {}
    for b, t in chosen:
        own = surprise[b][t]
        weight = {"linear": lambda: 1 + c.alpha * (own - mean) / (mean + c.information_eps),
                  "power": lambda: (max(own, c.information_eps) / (mean + c.information_eps)) ** c.alpha,
                  "exponential": lambda: math.exp(c.alpha * own)}[c.form]()
        weights[b, t] = min(max(weight, c.w_min), c.w_max)
    scale = 1.0
    if c.normalize:
        scale = math.fsum(out[b][t] for b, t in chosen) / math.fsum(out[b][t] * weights[b, t] for b, t in chosen)
    for b, t in chosen:
        out[b][t] *= weights[b, t] * scale
    return out


def positives(batch: RolloutBatch, plain: torch.Tensor, level: str) -> torch.Tensor:
    chosen = batch.mask & (plain > 0)
    return chosen & batch.answer_mask if level == "answer" else chosen


@pytest.mark.parametrize("form, level", VARIANTS)
@pytest.mark.parametrize("alpha", [-0.4, 0.7])
@pytest.mark.parametrize("normalize", [True, False])
def test_equal_to_the_definition(form, level, alpha, normalize):
    batch, stats = random_batch(2, dtype=torch.float64)
    config = ECVGPO.Config(alpha=alpha, form=form, level=level, normalize=normalize)
    plain = GRPO(GRPO.Config()).advantages(batch, stats)
    expected = torch.tensor(slow_advantages(batch, stats, plain, config), dtype=torch.float64)
    found = ECVGPO(config).advantages(batch, stats)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert (found - plain).abs().max() > 0.05


@pytest.mark.parametrize("form, level", VARIANTS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_alpha_zero_is_grpo_bit_for_bit(form, level, normalize, seed):
    batch, stats = random_batch(seed)
    plain = GRPO(GRPO.Config()).advantages(batch, stats)
    found = ECVGPO(ECVGPO.Config(alpha=0.0, form=form, level=level, normalize=normalize)).advantages(batch, stats)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("form", FORMS)
def test_alpha_zero_is_grpo_bit_for_bit_where_advantages_are_tiny(form):
    """Rewards that hardly differ: the positive mass is far below eps, and must not be mistaken for none."""
    batch, stats = random_batch(1)
    batch = replace(batch, rewards=batch.rewards * 1e-12)
    plain = GRPO(GRPO.Config()).advantages(batch, stats)
    assert 0 < plain.clamp_min(0).sum() < 1e-6
    assert torch.equal(ECVGPO(ECVGPO.Config(alpha=0.0, form=form)).advantages(batch, stats), plain)
    shaped = ECVGPO(ECVGPO.Config(alpha=0.4, form=form)).advantages(batch, stats)
    assert float(shaped.clamp_min(0).sum()) == pytest.approx(float(plain.clamp_min(0).sum()), rel=1e-5)


@pytest.mark.parametrize("form, level", VARIANTS)
@pytest.mark.parametrize("alpha", [-0.5, -0.25, 0.3])
def test_positive_mass_is_kept_and_the_rest_untouched(form, level, alpha):
    batch, stats = random_batch(4)
    plain = GRPO(GRPO.Config()).advantages(batch, stats)
    found = ECVGPO(ECVGPO.Config(alpha=alpha, form=form, level=level)).advantages(batch, stats)
    chosen = positives(batch, plain, level)
    assert float(found[chosen].sum()) == pytest.approx(float(plain[chosen].sum()), rel=1e-5)
    assert torch.equal(found[~chosen], plain[~chosen]) and (found[chosen] > 0).all()


@pytest.mark.parametrize("form, level", VARIANTS)
@pytest.mark.parametrize("alpha", [-20.0, 20.0])
def test_weights_stay_inside_their_bounds(form, level, alpha):
    batch, stats = random_batch(5)
    plain = GRPO(GRPO.Config()).advantages(batch, stats)
    algorithm = ECVGPO(ECVGPO.Config(alpha=alpha, form=form, level=level, normalize=False, w_min=0.7, w_max=1.6))
    chosen = positives(batch, plain, level)
    weights = (algorithm.advantages(batch, stats) / plain)[chosen]
    assert float(weights.min()) >= 0.7 - 1e-6 and float(weights.max()) <= 1.6 + 1e-6
    assert algorithm.metrics["ecvgpo/weight_at_bounds"] > 0.5
    assert algorithm.metrics["ecvgpo/weight_mean"] == pytest.approx(float(weights.mean()), rel=1e-5)


def test_alpha_says_which_tokens_gain():
    batch, stats = random_batch(6)
    plain = GRPO(GRPO.Config()).advantages(batch, stats)
    chosen = positives(batch, plain, "token")
    surprise = -stats.logprobs[chosen]
    for alpha, sign in ((0.4, 1), (-0.4, -1)):
        weights = (ECVGPO(ECVGPO.Config(alpha=alpha)).advantages(batch, stats) / plain)[chosen]
        assert float(torch.corrcoef(torch.stack([surprise, weights]))[0, 1]) * sign > 0.7


def test_sequence_level_weighs_an_answer_as_one():
    batch, stats = random_batch(7)
    plain = GRPO(GRPO.Config()).advantages(batch, stats)
    found = ECVGPO(ECVGPO.Config(alpha=0.4, level="sequence")).advantages(batch, stats)
    for b in range(len(plain)):
        own = found[b][batch.mask[b]]
        assert torch.allclose(own, own[:1])


def test_answer_level_needs_the_digits():
    batch, stats = random_batch()
    with pytest.raises(ValueError, match="algorithm.level=answer"):
        ECVGPO(ECVGPO.Config(level="answer")).advantages(replace(batch, answer_mask=None), stats)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_without_positives_stays_as_it_is(form):
    batch, stats = random_batch()
    batch = replace(batch, rewards=torch.full_like(batch.rewards, 0.5))
    found = ECVGPO(ECVGPO.Config(alpha=0.4, form=form)).advantages(batch, stats)
    assert (found == 0).all()


def test_no_gradient_through_the_weights():
    batch, stats = random_batch()
    logprobs = stats.logprobs.clone().requires_grad_()
    entropy = stats.entropy.clone().requires_grad_()
    algorithm = ECVGPO(ECVGPO.Config(alpha=0.4, target_entropy=1.0))
    assert not algorithm.advantages(batch, TokenScores(logprobs, entropy)).requires_grad


@pytest.mark.parametrize("form, level", VARIANTS)
def test_ranks_agree_with_one_process(form, level):
    batch, stats = random_batch(8)
    config = ECVGPO.Config(alpha=-0.4, form=form, level=level, target_entropy=1.0)
    whole = ECVGPO(config)
    expected = whole.advantages(batch, stats)
    rows = len(batch.rewards)
    cut = 2 * batch.group_size  # unequal shares

    def on_rank(rank, peers):
        algorithm = ECVGPO(config)
        part = rows_of(batch, stats, *((0, cut) if rank == 0 else (cut, rows)), peers)
        return algorithm.advantages(*part), algorithm

    (first, one), (second, two) = on_threads(2, on_rank)
    assert torch.allclose(torch.cat([first, second]), expected, rtol=0, atol=1e-6)
    assert one.metrics == two.metrics and one.metrics == pytest.approx(whole.metrics, rel=1e-6)
    assert one.alpha == two.alpha and one.alpha == pytest.approx(whole.alpha, abs=1e-7)


@pytest.mark.parametrize("target, bound", [(9.0, 0.5), (0.0, -0.5)])
def test_closed_loop_moves_alpha_and_is_bounded(target, bound):
    batch, stats = random_batch()
    entropy = float(stats.entropy.sum() / batch.mask.sum())
    algorithm = ECVGPO(ECVGPO.Config(alpha=-0.1, target_entropy=target, kappa=0.02))
    algorithm.advantages(batch, stats)
    assert algorithm.metrics["ecvgpo/alpha"] == -0.1, "the batch is reshaped with the alpha from before it"
    assert algorithm.alpha == pytest.approx(-0.1 + 0.02 * (target - entropy), abs=1e-6)
    path = [algorithm.alpha]
    for _ in range(40):
        algorithm.advantages(batch, stats)
        path.append(algorithm.alpha)
    assert path == sorted(path, reverse=bound < 0) and path[-1] == bound


def test_closed_loop_is_saved_and_restored():
    batch, stats = random_batch()
    config = ECVGPO.Config(target_entropy=3.0)
    algorithm, restored = ECVGPO(config), ECVGPO(config)
    algorithm.advantages(batch, stats)
    restored.load_state_dict(json.loads(json.dumps(algorithm.state_dict())))
    assert restored.alpha == algorithm.alpha != config.alpha
    assert torch.equal(restored.advantages(batch, stats), algorithm.advantages(batch, stats))


def test_open_loop_leaves_alpha_alone():
    batch, stats = random_batch()
    algorithm = ECVGPO(ECVGPO.Config())
    algorithm.advantages(batch, stats)
    assert algorithm.alpha == -0.25


@pytest.mark.parametrize("options", [{"w_min": 1.2}, {"w_max": 0.9}, {"w_min": -0.1}])
def test_bounds_that_exclude_one_are_refused(options):
    with pytest.raises(ConfigError, match="expected w_min <= 1 <= w_max"):
        build(ECVGPO.Config, options, "algorithm")


def entropy_of(logits: torch.Tensor) -> float:
    logp = logits.log_softmax(-1)
    return float(-(logp.exp() * logp).sum())


def toy(seed: int, num_tokens: int = 7, reach: float = math.inf) -> tuple[RolloutBatch, torch.Tensor, torch.Tensor]:
    """(batch, logits, token of each row): one state, each token as often as its probability, so sums are exact.

    Three tokens are good, of different probabilities and of a self-information below ``reach``.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = 3 + torch.randperm(40, generator=generator)[:num_tokens]
    tokens = torch.arange(num_tokens).repeat_interleave(counts)
    logits = (counts.double() / counts.sum()).log()
    near = torch.argsort(-logits)[:max(3, int((-logits < reach).sum()))]
    good = near[torch.randperm(len(near), generator=generator)[:3]]
    assert float((-logits[good]).max()) < reach
    rewards = torch.isin(tokens, good).double()
    batch = RolloutBatch(tokens[:, None], torch.ones(len(tokens), 1, dtype=torch.bool), rewards, len(tokens))
    return batch, logits, tokens


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(12))
def test_sign_law_natural_gradient(seed, form):
    """dH = -eta Cov(log pi, A): holds for every policy and every choice of good tokens."""
    batch, logits, tokens = toy(seed)
    stats = TokenScores(logits[tokens][:, None], torch.full((len(tokens), 1), entropy_of(logits)).double())
    after = {}
    for alpha in (-0.15, 0.0, 0.15):  # exp(alpha I) has no centre: a larger alpha would put every weight at a bound
        advantages = ECVGPO(ECVGPO.Config(alpha=alpha, form=form)).advantages(batch, stats)[:, 0]
        per_token = torch.stack([advantages[tokens == token].mean() for token in range(len(logits))])
        after[alpha] = entropy_of(logits + 1e-4 * per_token)
    assert after[-0.15] < after[0.0] < after[0.15]


@pytest.mark.parametrize("seed", range(12))
def test_sign_law_policy_gradient(seed):
    """One step down the loss: dH = -eta Cov(log pi, pi A).

    More weight on a surprising token raises entropy as long as its self-information is below 1 + H: beyond that
    pi (I - H) falls again. So the good tokens are drawn from below.
    """
    entropy = entropy_of(toy(seed)[1])
    batch, logits, tokens = toy(seed, reach=1 + entropy)
    after = {}
    for alpha in (-0.4, 0.0, 0.4):
        algorithm = ECVGPO(ECVGPO.Config(alpha=alpha))
        old = TokenScores(logits[tokens][:, None], torch.full((len(tokens), 1), entropy).double())
        advantages = algorithm.advantages(batch, old)
        ones = torch.ones_like(advantages)
        signal = PolicySignal(advantages, ones, ones, old.logprobs, None, batch.mask, torch.zeros_like(ones))
        trained = logits.clone().requires_grad_()
        new = TokenScores(trained.log_softmax(-1)[tokens][:, None], old.entropy)
        algorithm.token_loss(new, signal).mean().backward()
        after[alpha] = entropy_of(logits - 1e-3 * trained.grad)
    assert after[-0.4] < after[0.0] < after[0.4]
