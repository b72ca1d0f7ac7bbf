"""Drawing tokens: exact frequencies of temperature, top-k and top-p, and tokens that are never drawn."""

from __future__ import annotations

import math

import pytest
import torch

from megavg.protocols.options import SamplingParams
from megavg.ops.chance import uniforms
from megavg.rollout.sampling import draw

VOCAB, GRID = 23, 20_000


def naive_probs(logits: list[float], params: SamplingParams, forbidden: set[int]) -> list[float]:
    """What each token of one row should be drawn with, in plain Python."""
    weights = {i: math.exp(z / params.temperature) for i, z in enumerate(logits) if i not in forbidden}
    order = sorted(weights, key=weights.get, reverse=True)
    if params.top_k:
        order = order[:params.top_k]
    total, kept, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if mass >= params.top_p * total:
            break
        kept.append(i)
        mass += weights[i]
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(logits))]


def mask_of(forbidden: set[int], size: int = VOCAB) -> torch.Tensor:
    return torch.tensor([i in forbidden for i in range(size)])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.8), (7, 0.6), (1, 1.0), (0, 1e-6), (100, 0.999)])
@pytest.mark.parametrize("forbidden", [set(), {0, 3, VOCAB - 1}])
def test_frequencies_equal_the_naive_ones(temperature, top_k, top_p, forbidden):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = 2 * torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    for row in logits:
        # noise on a grid: the inverse of the distribution function gives every token its share of the grid
        noise = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
        tokens, _ = draw(row.expand(GRID, -1), noise, params, mask_of(forbidden))
        counts = torch.bincount(tokens, minlength=VOCAB)
        expected = torch.tensor(naive_probs(row.double().tolist(), params, forbidden), dtype=torch.float64)
        assert float((counts / GRID - expected).abs().max()) <= 1.5 / GRID
        assert not counts[expected == 0].any()


def test_rows_do_not_depend_on_each_other():
    params = SamplingParams(temperature=0.9, top_k=6, top_p=0.9)
    generator = torch.Generator().manual_seed(2)
    logits, noise = torch.randn(40, VOCAB, generator=generator), torch.rand(40, generator=generator).double()
    together = draw(logits, noise, params, mask_of({4}))
    for b in range(40):
        alone = draw(logits[b:b + 1], noise[b:b + 1], params, mask_of({4}))
        assert all(torch.equal(a, t[b:b + 1]) for a, t in zip(alone, together))


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_logprobs_are_of_the_whole_vocabulary(temperature):
    logits = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(3))
    noise = torch.rand(50, generator=torch.Generator().manual_seed(4)).double()
    tokens, logprobs = draw(logits, noise, SamplingParams(temperature=temperature, top_k=3), mask_of({0, 1}))
    expected = (logits.double() / (temperature or 1.0)).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-6, rtol=0)


def test_greedy_takes_the_best_allowed_token():
    logits = torch.tensor([[1.0, 5.0, 3.0, 4.0], [9.0, 8.0, 7.0, 6.0]])
    greedy = SamplingParams(temperature=0.0)
    assert draw(logits, torch.zeros(2).double(), greedy, mask_of(set(), 4))[0].tolist() == [1, 0]
    assert draw(logits, torch.zeros(2).double(), greedy, mask_of({1, 0}, 4))[0].tolist() == [3, 2]


@pytest.mark.parametrize("noise", [0.0, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=2), SamplingParams(top_p=0.5),
                                    SamplingParams(temperature=0.01)])
def test_forbidden_tokens_are_not_drawn_at_either_end(noise, params):
    """Both ends of the vocabulary are forbidden and have by far the largest logits."""
    logits = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(5))
    forbidden = {0, 1, VOCAB - 2, VOCAB - 1}
    logits[:, sorted(forbidden)] = 40.0
    tokens, logprobs = draw(logits, torch.full((64,), noise, dtype=torch.float64), params, mask_of(forbidden))
    assert not set(tokens.tolist()) & forbidden
    assert torch.isfinite(logprobs).all() and float(logprobs.max()) < -30


def test_uniforms_depend_on_the_stream_alone():
    state = torch.get_rng_state()
    a, b, c = uniforms("0/1/sample/0", 50), uniforms("0/1/sample/0", 80), uniforms("0/1/sample/1", 50)
    assert torch.equal(a, b[:50]) and not torch.equal(a, c)
    assert a.dtype == torch.float64 and 0 <= float(a.min()) and float(a.max()) < 1
    assert torch.equal(state, torch.get_rng_state())


def test_uniforms_of_many_streams_are_uniform():
    first = torch.tensor([float(uniforms(f"{seed}/stream", 1)) for seed in range(2000)]).sort().values
    ideal = (torch.arange(2000) + 0.5) / 2000
    assert float((first - ideal).abs().max()) < 1.63 / 2000**0.5  # Kolmogorov-Smirnov at 1 %
