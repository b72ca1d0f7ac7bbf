"""SaEI on a small real policy: the selection, the ball, the gain in entropy against its controls, and eps = 0."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megavg.algorithms.grpo import GRPO
from megavg.algorithms.saei import SaEI
from megavg.protocols.config import ConfigError, build
from megavg.protocols.policy import Answer
from tests.algorithms.toy_explorer import LAYOUT, ToyExplorer, prompts_of
from tests.rollout_batches import on_ranks, random_batch

IMAGES = (6, 9, 0, 4)


def explorer_of(seed: int = 0, group_size: int = 6, images=IMAGES) -> ToyExplorer:
    return ToyExplorer(prompts_of(images, seed), group_size, seed)


def slow_weights(entropies: list[list[float]], low: float, high: float) -> list[list[float]]:
    """S / |S| for the answers of one prompt; quantiles by linear interpolation between sorted numbers."""
    flat = sorted(h for answer in entropies for h in answer)

    def quantile(q: float) -> float:
        at = q * (len(flat) - 1)
        below = math.floor(at)
        above = min(below + 1, len(flat) - 1)
        return flat[below] + (at - below) * (flat[above] - flat[below])

    chosen = [[quantile(low) <= h <= quantile(high) for h in answer] for answer in entropies]
    count = sum(map(sum, chosen))
    if not count:
        return [[1 / len(flat)] * len(answer) for answer in entropies]
    return [[flag / count for flag in answer] for answer in chosen]


def same(first: list[list[Answer]], second: list[list[Answer]]) -> bool:
    return all(a.tokens == b.tokens and torch.equal(a.logprobs, b.logprobs) and a.on_clean == b.on_clean
               for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def attack(config: SaEI.Config, explorer: ToyExplorer):
    """(first answers, attacked prompts)."""
    answers = explorer.sample(3)
    return answers, SaEI(config).other_prompts(explorer, answers, 0.5)


def mean_entropy(explorer: ToyExplorer, answers, weights: torch.Tensor, prompts) -> list[float]:
    """J of each prompt."""
    terms = weights * explorer.scores(answers, prompts)[0].entropy
    return terms.double().view(len(explorer.prompts), -1).sum(1).tolist()


@pytest.mark.parametrize("low, high", [(0.5, 0.95), (0.0, 1.0), (0.3, 0.3), (0.2, 0.75)])
@pytest.mark.parametrize("seed", range(4))
def test_selection(seed, low, high):
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.rand(6, 8, generator=generator, dtype=torch.float64)
    entropy[1] = entropy[0]  # equal numbers
    mask = torch.arange(8) < torch.tensor([8, 5, 1, 8, 2, 7])[:, None]
    mask[4:] = False  # the last prompt has one token,
    mask[4, 0] = seed % 2 == 0
    mask[5, 3] = seed < 3  # two, or none
    found = SaEI(SaEI.Config(quantile_low=low, quantile_high=high))._token_weights(entropy, mask, 3)
    for p in range(3):
        rows = range(2 * p, 2 * p + 2)
        valid = [[float(h) for h, ok in zip(entropy[b], mask[b]) if ok] for b in rows]
        if not any(valid):
            assert not found[2 * p:2 * p + 2].any()
            continue
        for b, expected in zip(rows, slow_weights(valid, low, high)):
            assert found[b][mask[b]].tolist() == pytest.approx(expected)
        assert not found[~mask].any()
    everything = SaEI(SaEI.Config(tokens="all"))._token_weights(entropy, mask, 3)
    assert torch.equal(everything > 0, mask)


@pytest.mark.parametrize("config", [SaEI.Config(), SaEI.Config(steps=4), SaEI.Config(direction="random_sign"),
                                    SaEI.Config(eps=0.5, steps=3)],
                         ids=["one step", "four steps", "random signs", "a large ball"])
def test_the_ball_is_respected(config):
    explorer = explorer_of()
    _, attacked = attack(config, explorer)
    for clean, prompt in zip(explorer.prompts, attacked):
        if not clean.image_grid_thw:
            assert prompt is clean
            continue
        moved = (LAYOUT.split(prompt.pixel_values).double() - LAYOUT.split(clean.pixel_values).double()).abs()
        for c, std in enumerate(LAYOUT.std):
            assert 0.5 * config.eps / std < float(moved[:, c].max()) <= config.eps / std
        black, white = LAYOUT.bounds(clean.pixel_values)
        frames = LAYOUT.split(prompt.pixel_values)
        assert (frames >= black).all() and (frames <= white).all() and torch.equal(frames[:, :, 0], frames[:, :, 1])
        assert prompt.input_ids == clean.input_ids and prompt.image_grid_thw == clean.image_grid_thw


def test_one_step_goes_along_the_sign_of_the_gradient():
    """The gradient by differences of J in double precision, pixel by pixel and with both copies moved."""
    explorer = explorer_of(images=(2, 3)).double()
    explorer.prompts = [replace(p, pixel_values=p.pixel_values.double()) for p in explorer.prompts]
    config = SaEI.Config(eps=1e-3)
    answers, attacked = attack(config, explorer)
    scores, mask = explorer.scores(answers)
    for p, clean in enumerate(explorer.prompts):
        rows = range(3 * p, 3 * p + 3)
        weights = slow_weights([scores.entropy[b][mask[b]].tolist() for b in rows], 0.5, 0.95)
        for n in range(len(clean.pixel_values)):
            for c in range(3):
                for q in range(4):
                    moved = []
                    for h in (1e-4, -1e-4):
                        pixels = clean.pixel_values.clone()
                        LAYOUT.split(pixels)[n, c, :, q] += h
                        found = explorer.scored(answers[p:p + 1], [pixels])[0].entropy.detach()
                        moved.append(math.fsum(w * float(found[i, t]) for i in range(3)
                                               for t, w in enumerate(weights[i])))
                    step = LAYOUT.split(attacked[p].pixel_values - clean.pixel_values)[n, c, 0, q]
                    assert float(step) * (moved[0] - moved[1]) > 0


@pytest.mark.parametrize("steps", [1, 5])
def test_entropy_rises_and_more_than_by_chance(steps):
    """J over S of the attacked images, averaged over prompts and seeds."""
    gains = {"gradient": [], "random_sign": []}
    for seed in range(12):
        for direction, found in gains.items():
            explorer = explorer_of(seed)
            config = SaEI.Config(eps=16 / 255, steps=steps, direction=direction)
            answers, attacked = attack(config, explorer)
            weights = SaEI(config)._token_weights(*(lambda s: (s[0].entropy, s[1]))(explorer.scores(answers)), 4)
            before, after = (mean_entropy(explorer, answers, weights, p) for p in (explorer.prompts, attacked))
            found += [b - a for a, b, n in zip(before, after, IMAGES) if n]
            assert before[2] == after[2]
    uphill, chance = (math.fsum(values) / len(values) for values in gains.values())
    assert uphill > 0.01 and uphill > 5 * abs(chance)


def test_several_steps_are_projected_after_each():
    """Against the iteration written out; S is that of the clean image throughout."""
    explorer, eps, steps = explorer_of(3), 0.05, 4
    answers, attacked = attack(SaEI.Config(eps=eps, steps=steps), explorer)
    scores, mask = explorer.scores(answers)
    weights = SaEI(SaEI.Config())._token_weights(scores.entropy, mask, 4)
    now = list(explorer.prompts)
    for _ in range(steps):
        gradients = explorer.entropy_gradients(answers, weights, now)
        for p, clean in enumerate(explorer.prompts):
            if IMAGES[p]:
                pixels = LAYOUT.split(now[p].pixel_values).clone()
                for c, std in enumerate(LAYOUT.std):
                    uphill = LAYOUT.split(gradients[p])[:, c].sum(1, keepdim=True).sign()
                    original = LAYOUT.split(clean.pixel_values)[:, c]
                    moved = pixels[:, c] + 2.5 * eps / steps / std * uphill
                    low, high = -LAYOUT.mean[c] / std, (1 - LAYOUT.mean[c]) / std
                    pixels[:, c] = moved.clamp(original - eps / std, original + eps / std).clamp(low, high)
                now[p] = replace(clean, pixel_values=pixels.flatten(1))
    for found, expected in zip(attacked, now):
        assert torch.allclose(found.pixel_values, expected.pixel_values, atol=1e-6)


@pytest.mark.parametrize("group_size, num_clean, expected", [(6, None, 3), (5, None, 2), (6, 4, 4), (6, 1, 1)])
def test_the_group_is_clean_answers_first_and_then_the_attacked(group_size, num_clean, expected):
    explorer = explorer_of(1, group_size)
    config = SaEI.Config(num_clean=num_clean, eps=0.2)
    found = SaEI(config).explore(explorer, 0.5)
    plain = explorer.sample(group_size)
    first = explorer.sample(expected)
    attacked = SaEI(config).other_prompts(explorer, first, 0.5)
    rest = explorer.sample(group_size - expected, expected, attacked)
    assert [len(group) for group in found] == [group_size] * 4
    for p, group in enumerate(found):
        assert same([group[:expected]], [plain[p][:expected]])
        assert [a.tokens for a in group[expected:]] == [a.tokens for a in rest[p]]
        assert [a.on_clean for a in group] == [True] * expected + [not IMAGES[p]] * (group_size - expected)
    assert same([found[2]], [plain[2]])  # no image, nothing to attack
    assert any(a.tokens != b.tokens for p in (0, 1, 3) for a, b in zip(found[p], plain[p]))


@pytest.mark.parametrize("direction", ["gradient", "random_sign"])
def test_no_eps_is_plain_sampling(direction):
    explorer = explorer_of(2)
    found = SaEI(SaEI.Config(eps=0.0, direction=direction, report_gain=True)).explore(explorer, 0.5)
    assert explorer.calls == [("sample", 6, 0)]
    assert same(found, GRPO(GRPO.Config()).explore(explorer, 0.5))


def test_a_group_of_clean_answers_alone_is_plain_sampling():
    for explorer, config in ((explorer_of(2), SaEI.Config(num_clean=6)), (explorer_of(2, 1), SaEI.Config())):
        found = SaEI(config).explore(explorer, 0.5)
        assert explorer.calls == [("sample", explorer.group_size, 0)]
        assert same(found, explorer.sample(explorer.group_size))
    with pytest.raises(ValueError, match="num_clean=7.*group_size=6"):
        SaEI(SaEI.Config(num_clean=7)).check(6, 9)


@pytest.mark.parametrize("direction", ["gradient", "random_sign"])
@pytest.mark.parametrize("report", [True, False])
def test_what_is_asked_of_the_model_never_depends_on_the_prompts(direction, report):
    calls = []
    for images in ((6, 9), (0, 0), (0, 5)):
        explorer = explorer_of(images=images)
        SaEI(SaEI.Config(steps=2, direction=direction, report_gain=report)).explore(explorer, 0.5)
        calls.append(explorer.calls)
    assert calls[0] == calls[1] == calls[2]
    assert (("entropy_gradients",) in calls[0]) == (direction == "gradient")


def test_no_parameter_receives_a_gradient_and_no_image_changes():
    explorer = explorer_of()
    before = [p.pixel_values.clone() for p in explorer.prompts]
    SaEI(SaEI.Config(steps=3, report_gain=True)).explore(explorer, 0.5)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in explorer.parameters())
    assert all(torch.equal(p.pixel_values, old) for p, old in zip(explorer.prompts, before))


def test_the_gain_is_reported_over_all_prompts_with_an_image():
    """Two draws of prompts on one rank, and the same prompts on two ranks."""
    config = SaEI.Config(eps=0.1, report_gain=True)
    batch, stats = random_batch(0)
    expected = [[], []]
    for seed in (1, 2):
        explorer = explorer_of(seed)
        answers, attacked = attack(config, explorer)
        scores, mask = explorer.scores(answers)
        weights = SaEI(config)._token_weights(scores.entropy, mask, 4)
        for out, prompts in zip(expected, (explorer.prompts, attacked)):
            out += [j for j, n in zip(mean_entropy(explorer, answers, weights, prompts), IMAGES) if n]
    wanted = {"saei/entropy_clean": math.fsum(expected[0]) / 6, "saei/entropy_attacked": math.fsum(expected[1]) / 6}
    method = SaEI(config)
    for seed in (1, 2):
        method.explore(explorer_of(seed), 0.5)
    plain = GRPO(GRPO.Config()).advantages(batch, stats)
    assert torch.equal(method.advantages(batch, stats), plain)
    assert method.metrics == pytest.approx(wanted, abs=1e-6)
    assert wanted["saei/entropy_attacked"] > wanted["saei/entropy_clean"]
    method.explore(explorer_of(1), 0.5)  # the next step starts from zero
    method.advantages(batch, stats)
    assert method.metrics["saei/entropy_clean"] == pytest.approx(math.fsum(expected[0][:3]) / 3, abs=1e-6)

    def on_rank(part, scores, start, stop):
        own = SaEI(config)
        own.explore(explorer_of(1 if start == 0 else 2), 0.5)
        own.advantages(part, scores)
        return own.metrics

    assert all(metrics == pytest.approx(wanted, abs=1e-6) for metrics in on_ranks(batch, stats, (8,), on_rank))


def test_options():
    assert (SaEI.Config().eps, SaEI.Config().num_clean) == (4 / 255, None)
    for wrong in ({"eps": -0.1}, {"eps": 4.0}, {"steps": 0}, {"quantile_low": 0.96}, {"quantile_high": 1.1},
                  {"num_clean": 0}, {"direction": "down"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            build(SaEI.Config, wrong, "algorithm")
