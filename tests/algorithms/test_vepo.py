"""VEPO against a slow implementation in double precision: eight scores, the selection, what is counted."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from megavg.algorithms.grpo import GRPO
from megavg.algorithms.vepo import VEPO
from megavg.protocols.batch import PerturbedScores, RolloutBatch, TokenScores
from megavg.protocols.config import ConfigError, build, to_tree
from megavg.protocols.options import Perturbation
from megavg.trainer.step import make_signal
from tests.rollout_batches import on_ranks, random_batch


def wide_batch(seed: int = 0, **kwargs) -> tuple[RolloutBatch, TokenScores]:
    return random_batch(seed, num_prompts=3, group_size=3, width=21, dtype=torch.float64, **kwargs)


def slow_scores(c: VEPO.Config, h: list[float], other: list[float], jsd: list[float], kl: list[float]) -> list[float]:
    """The score of every token of one answer."""
    def normal(values: list[float]) -> list[float]:
        return [(x - min(values)) / max(max(values) - min(values), 1e-8) for x in values]

    gaps = [q - p for p, q in zip(h, other)]
    gaps = [max(gap, 0.0) for gap in gaps] if c.score == "C" else [abs(gap) for gap in gaps]
    out = []
    for j, d, e in zip(normal(kl if c.score == "H" else jsd), normal(gaps), normal(h)):
        a = c.divergence_share
        mixed = 1 - math.pow(1 - j, a) * math.pow(1 - d, 1 - a)
        out.append({"A": 1 - (1 - j) * (1 - e) * (1 - d), "B": (1 - (1 - j) * (1 - e)) * d, "C": mixed * e,
                    "D": mixed * e, "E": mixed, "F": (1 - (a * (1 - j) + (1 - a) * (1 - d))) * e, "G": j * d * e,
                    "H": mixed * e}[c.score])
    return out


def slow_selection(c: VEPO.Config, batch: RolloutBatch, stats: TokenScores) -> list[list[bool]]:
    rows, width = batch.mask.shape
    selected = [[False] * width for _ in range(rows)]
    for b in range(rows):
        valid = [t for t in range(width) if batch.mask[b, t]]
        if not valid:
            continue
        other = stats.perturbed
        values = slow_scores(c, *([float(x[b, t]) for t in valid]
                                  for x in (stats.entropy, other.entropy, other.jsd, other.kl)))
        count = max(1, math.ceil(Fraction(str(c.keep)) * len(valid)))
        sign = -1 if c.take == "top" else 1
        for _, t in sorted((sign * value, t) for value, t in zip(values, valid))[:count]:
            selected[b][t] = True
    return selected


def weights_of(config: VEPO.Config, batch: RolloutBatch, stats: TokenScores) -> tuple[VEPO, torch.Tensor]:
    vepo = VEPO(config)
    return vepo, vepo.weights(batch, stats, torch.ones_like(stats.entropy), 0.5)


@pytest.mark.parametrize("score", "ABCDEFGH")
@pytest.mark.parametrize("take", ["top", "bottom"])
@pytest.mark.parametrize("keep, share", [(0.2, 0.7), (0.07, 0.25), (0.5, 1.0), (0.34, 0.0), (1.0, 0.7)])
def test_selection(score, take, keep, share):
    config = VEPO.Config(score=score, take=take, keep=keep, divergence_share=share)
    for seed in range(3):
        batch, stats = wide_batch(seed)
        _, found = weights_of(config, batch, stats)
        assert found.tolist() == [[float(x) for x in row] for row in slow_selection(config, batch, stats)]


def test_the_scores_themselves():
    for score in "ABCDEFGH":
        config = VEPO.Config(score=score)
        batch, stats = wide_batch(4)
        found = VEPO(config)._scores(batch, stats)
        for b in range(len(found)):
            valid = batch.mask[b]
            rows = (x[b][valid].tolist() for x in (stats.entropy, stats.perturbed.entropy, stats.perturbed.jsd,
                                                   stats.perturbed.kl))
            assert found[b][valid].tolist() == pytest.approx(slow_scores(config, *rows), abs=1e-12)


def test_the_scores_differ_in_what_they_select():
    batch, stats = wide_batch(1)
    chosen = {score: tuple(weights_of(VEPO.Config(score=score), batch, stats)[1].flatten().tolist())
              for score in "ABCDEFGH"}
    assert len(set(chosen.values())) == 8


@pytest.mark.parametrize("length, keep, count", [(1, 0.2, 1), (5, 0.2, 1), (6, 0.2, 2), (100, 0.07, 7), (15, 0.2, 3),
                                                 (10, 0.3, 3), (3, 0.01, 1), (7, 1.0, 7)])
def test_how_many_are_kept(length, keep, count):
    batch, stats = random_batch(0, 1, 1, length)
    assert weights_of(VEPO.Config(keep=keep), batch, stats)[1].sum() == count


@pytest.mark.parametrize("take", ["top", "bottom"])
def test_equal_scores_go_by_position(take):
    """All tokens alike: max = min, every score is 0, and the first ones are taken."""
    batch, stats = random_batch(2, 2, 3, 9)
    same = torch.full_like(stats.entropy, 0.3)
    stats = replace(stats, entropy=same, perturbed=PerturbedScores(same, same, same, same))
    _, found = weights_of(VEPO.Config(keep=0.4, take=take), batch, stats)
    for row, length in zip(found, batch.mask.sum(1).tolist()):
        count = math.ceil(Fraction("0.4") * length)
        assert row.tolist() == [1.0] * count + [0.0] * (9 - count)


def test_padding_is_never_selected_and_an_empty_answer_does_no_harm():
    batch, stats = wide_batch(3)
    batch.mask[4] = False
    huge = torch.full_like(stats.entropy, 50.0)
    stats = replace(stats, entropy=stats.entropy.where(batch.mask, huge),
                    perturbed=replace(stats.perturbed, jsd=stats.perturbed.jsd.where(batch.mask, huge)))
    config = VEPO.Config()
    vepo, found = weights_of(config, batch, stats)
    assert found.isfinite().all() and not found[~batch.mask].any() and not found[4].any()
    assert found.tolist() == [[float(x) for x in row] for row in slow_selection(config, batch, stats)]
    assert all(math.isfinite(value) for value in vepo.metrics.values())


def test_the_mean_is_over_the_selected_tokens():
    batch, stats = wide_batch(5)
    vepo = VEPO(VEPO.Config())
    signal = make_signal(vepo, batch, stats, None, 0.5)
    selected = torch.tensor(slow_selection(vepo.config, batch, stats))
    count = int(selected.sum())
    assert torch.allclose(signal.coefficients * signal.weights, selected.float() / count, atol=1e-7)
    valid = int(batch.mask.sum())
    assert torch.allclose(signal.entropy_weights, 1e-3 * batch.mask.float() / valid, atol=1e-9)
    plain = make_signal(GRPO(GRPO.Config()), batch, stats, None, 0.5)
    assert torch.equal(signal.advantages, plain.advantages)


def test_a_bonus_keeps_all_tokens():
    batch, stats = wide_batch(6)
    vepo = VEPO(VEPO.Config(selected_bonus=0.5))
    signal = make_signal(vepo, batch, stats, None, 0.5)
    selected = torch.tensor(slow_selection(vepo.config, batch, stats))
    assert torch.equal(signal.weights, batch.mask.float() + 0.5 * selected)
    assert torch.allclose(signal.coefficients, batch.mask.float() / batch.mask.sum(), atol=1e-7)


def test_it_multiplies_with_what_another_method_says():
    class HalfOdd(GRPO):
        """Drops the first token and halves the others."""

        def weights(self, batch, stats, advantages, progress):
            out = 0.5 * batch.mask.float()
            out[:, 0] = 0
            return out

    class Both(VEPO, HalfOdd):
        """Both."""

    batch, stats = wide_batch(7)
    alone = weights_of(VEPO.Config(keep=0.5), batch, stats)[1]
    both = Both(Both.Config(keep=0.5))
    found = both.weights(batch, stats, torch.ones_like(stats.entropy), 0.5)
    expected = 0.5 * alone
    expected[:, 0] = 0
    assert torch.equal(found, expected)
    assert torch.equal(both.counted_tokens(batch, found), expected > 0)


def test_metrics_and_independence_of_ranks():
    batch, stats = wide_batch(8)
    vepo, whole = weights_of(VEPO.Config(), batch, stats)
    at = [(b, t) for b in range(9) for t in range(21) if batch.mask[b, t]]
    chosen = slow_selection(vepo.config, batch, stats)
    jsd = {bt: float(stats.perturbed.jsd[bt]) for bt in at}
    inside = [jsd[b, t] for b, t in at if chosen[b][t]]
    expected = {"vepo/selected_share": len(inside) / len(at), "vepo/jsd_mean": math.fsum(jsd.values()) / len(at),
                "vepo/gap_mean": math.fsum(abs(float(stats.perturbed.entropy[bt] - stats.entropy[bt])) for bt in at)
                / len(at), "vepo/jsd_selected": math.fsum(inside) / len(inside)}
    assert vepo.metrics == pytest.approx(expected, abs=1e-6)
    assert vepo.metrics["vepo/jsd_selected"] > vepo.metrics["vepo/jsd_mean"]

    def on_rank(part, scores, start, stop):
        return weights_of(VEPO.Config(), part, scores)

    for cuts in ((3,), (1, 7)):
        parts = on_ranks(batch, stats, cuts, on_rank)
        assert torch.equal(torch.cat([weights for _, weights in parts]), whole)
        assert all(part.metrics == pytest.approx(vepo.metrics) for part, _ in parts)


def test_no_gradient_flows_through_the_selection():
    batch, stats = wide_batch(9)
    stats = replace(stats, entropy=stats.entropy.requires_grad_())
    assert not weights_of(VEPO.Config(selected_bonus=1.0), batch, stats)[1].requires_grad


def test_scores_without_perturbed_images_are_refused():
    batch, stats = wide_batch(0)
    with pytest.raises(ValueError, match="stats.perturbed"):
        weights_of(VEPO.Config(), batch, replace(stats, perturbed=None))


def test_options():
    config = build(VEPO.Config, {"perturbation": {"kind": "diffusion"}, "score": "H"}, "algorithm")
    assert VEPO(config).perturbation == Perturbation("diffusion") and build(VEPO.Config, to_tree(config)) == config
    assert VEPO(VEPO.Config()).perturbation == Perturbation("gaussian", std=2.0)
    assert (config.aggregation, config.entropy_coefficient, config.kl_coefficient) == ("token_mean", 1e-3, 0.0)
    for wrong in ({"keep": 0.0}, {"keep": 1.1}, {"divergence_share": -0.1}, {"selected_bonus": -1.0}, {"score": "I"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            build(VEPO.Config, wrong, "algorithm")
