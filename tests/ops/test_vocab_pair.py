"""Jensen-Shannon divergence, KL and entropy gap of two sets of hidden states under one head, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from megavg.ops import Blocks, VocabShard, pair_divergence
from tests.ops.vocab_examples import dense_log_softmax, dense_pair, example, gradients, relative, with_offset

SMALL = Blocks(16, 64)


def pair(num_tokens, dim, vocab_size, dtype=torch.float32, scale=1.0, distance=0.3):
    """hidden states of P and Q [N, D], weight [V, D], upstream gradients of divergence and gap [2, N]."""
    hidden, weight, _, upstream = example(num_tokens, dim, vocab_size, dtype, scale=scale)
    noise = torch.randn(num_tokens, dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return hidden, hidden + (distance * scale * noise / dim**0.5).to(dtype), weight, upstream


def differences(hidden_p, hidden_q, weight, upstream, **keywords):
    """(largest errors of divergence and gap, relative errors of the gradients to P's, Q's hidden states, the head)."""
    inputs = [t.detach().requires_grad_() for t in (hidden_p, hidden_q, weight)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    scores = pair_divergence(*inputs, VocabShard.whole(len(weight)), **keywords)
    expected = dense_pair(*exact, keywords.get("temperature", 1.0))
    found = scores.jsd, scores.entropy_gap
    values = [float((a.double() - b).detach().abs().max()) for a, b in zip(found, expected)]
    grads = [relative(a, b) for a, b in zip(gradients(found, inputs, upstream), gradients(expected, exact, upstream))]
    return values, grads


@pytest.mark.parametrize("blocks", [SMALL, None], ids=["small", "default"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_equals_dense_in_float64(blocks, temperature):
    values, grads = differences(*pair(37, 9, 301, torch.float64), temperature=temperature, blocks=blocks)
    assert max(values) < 1e-13 and max(grads) < 1e-12


@pytest.mark.parametrize("scale, distance, bound", [(1.0, 0.3, 1e-5), (6.0, 0.3, 1e-4), (6.0, 2.0, 1e-4),
                                                    (6.0, 0.01, 1e-3), (20.0, 0.3, 1e-4)])
def test_fp32_is_exact_where_p_is_near_q_and_where_it_is_not(scale, distance, bound):
    """At logits of scale 6 gradients are within 1e-4; log p - log m, taken as it stands, has 4e-4.

    At a distance of 0.01 the divergence is 1e-4 and its gradient a difference of logits: their own rounding is felt.
    """
    hidden_p, hidden_q, weight, upstream = pair(67, 64, 3001, scale=scale, distance=distance)
    values, grads = differences(hidden_p, hidden_q, weight, upstream)
    assert values[0] < 1e-5 and values[1] < 5e-5
    assert max(grads) < bound
    upstream[1] = 0  # the divergence alone
    assert max(differences(hidden_p, hidden_q, weight, upstream)[1]) < bound


def test_gradcheck():
    hidden_p, hidden_q, weight, _ = pair(4, 3, 7, torch.float64)
    bias = torch.linspace(-1, 1, 9, dtype=torch.float64)
    weight = torch.cat([weight, weight[:2]])  # two rows of padding

    def both(p, q, w, b):
        scores = pair_divergence(p, q, w, VocabShard(0, 9, 7), torch.linspace(0.5, 2, 4), bias=b, blocks=Blocks(2, 3))
        return scores.jsd, scores.entropy_gap

    assert torch.autograd.gradcheck(both, [t.requires_grad_() for t in (hidden_p, hidden_q, weight, bias)])


@pytest.mark.parametrize("fixed", ["p", "q", "head"])
def test_one_side_may_be_held_fixed(fixed):
    hidden_p, hidden_q, weight, upstream = pair(20, 8, 301, torch.float64)
    inputs = {"p": hidden_p, "q": hidden_q, "head": weight}
    trained = [tensor.requires_grad_() for name, tensor in inputs.items() if name != fixed]
    scores = pair_divergence(hidden_p, hidden_q, weight, VocabShard.whole(301), blocks=SMALL)
    found = gradients((scores.jsd, scores.entropy_gap), trained, upstream)
    expected = gradients(dense_pair(hidden_p, hidden_q, weight), trained, upstream)
    assert max(relative(a, b) for a, b in zip(found, expected)) < 1e-12


def test_disjoint_distributions_reach_log_2_and_equal_ones_zero():
    weight = torch.eye(6) * 300
    hidden = torch.eye(6)
    apart = pair_divergence(hidden, hidden.roll(1, 0), weight, VocabShard.whole(6))
    torch.testing.assert_close(apart.jsd, torch.full((6,), math.log(2)))
    same = pair_divergence(hidden, hidden.clone(), weight, VocabShard.whole(6))
    assert not same.jsd.any() and not same.entropy_gap.any()


@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_offsets_of_all_logits_change_nothing(offset):
    hidden_p, hidden_q, weight, upstream = pair(9, 4, 31)
    expected = dense_pair(hidden_p, hidden_q, weight)
    shifted, shifted_weight = with_offset(hidden_p, weight, offset)
    inputs = [shifted.requires_grad_(), with_offset(hidden_q, weight, offset)[0].requires_grad_(), shifted_weight]
    scores = pair_divergence(*inputs, VocabShard.whole(31))
    for ours, theirs in zip((scores.jsd, scores.entropy_gap), expected):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-4, rtol=0)
    assert all(torch.isfinite(g).all() for g in gradients((scores.jsd, scores.entropy_gap), inputs[:2], upstream))


def test_entropies_are_those_of_both_sides():
    hidden_p, hidden_q, weight, _ = pair(9, 4, 31, torch.float64)
    scores = pair_divergence(hidden_p, hidden_q, weight, VocabShard.whole(31))
    for found, hidden in ((scores.entropy_p, hidden_p), (scores.entropy_q, hidden_q)):
        torch.testing.assert_close(found, torch.distributions.Categorical(logits=hidden @ weight.T).entropy())


def exact_kl(hidden_p, hidden_q, weight, temperature=1.0) -> torch.Tensor:
    """KL(P || Q) of each row in float64, term by term from the definition."""
    p, q = (dense_log_softmax(hidden, weight, None, temperature) for hidden in (hidden_p, hidden_q))
    return torch.stack([sum(a.exp() * (a - b) for a, b in zip(*row)) for row in zip(p, q)])


@pytest.mark.parametrize("blocks", [SMALL, None], ids=["small", "default"])
@pytest.mark.parametrize("temperature", [0.7, torch.linspace(0.5, 2, 37)])
def test_kl_equals_its_definition(blocks, temperature):
    hidden_p, hidden_q, weight, _ = pair(37, 9, 301, torch.float64)
    scores = pair_divergence(hidden_p.requires_grad_(), hidden_q, weight, VocabShard.whole(301), temperature,
                             blocks=blocks)
    torch.testing.assert_close(scores.kl, exact_kl(hidden_p.detach(), hidden_q, weight, temperature), atol=1e-13,
                               rtol=1e-12)
    assert scores.jsd.requires_grad and not scores.kl.requires_grad


@pytest.mark.parametrize("scale, distance, bound", [(1.0, 0.3, 3e-6), (6.0, 2.0, 3e-6), (6.0, 0.01, 1e-3),
                                                    (6.0, 0.001, 5e-3), (20.0, 1.0, 5e-5), (20.0, 0.01, 1e-3)])
def test_kl_in_fp32_is_exact_in_every_row_near_and_far(scale, distance, bound):
    """Relative to each row's own KL, down to 5e-14 nats; sum p (log p - log q), as it stands, misses that by 70 times.

    What is left is the rounding of the logits themselves.
    """
    hidden_p, hidden_q, weight, _ = pair(23, 64, 1001, scale=scale, distance=distance)
    found = pair_divergence(hidden_p, hidden_q, weight, VocabShard.whole(1001)).kl
    expected = exact_kl(hidden_p, hidden_q, weight)
    assert float(((found.double() - expected) / expected).abs().max()) < bound


def test_kl_where_one_side_vanishes():
    """p is 0 in fp32 where q is 1, and q where p is; KL is then the distance of the logits."""
    weight, hidden = torch.eye(6) * 300, torch.eye(6)
    apart = pair_divergence(hidden, hidden.roll(1, 0), weight, VocabShard.whole(6))
    torch.testing.assert_close(apart.kl, torch.full((6,), 300.0))
    assert not pair_divergence(hidden, hidden.clone(), weight, VocabShard.whole(6)).kl.any()
    # one side is flat, the other one sharp
    flat = torch.zeros(6, 6)
    torch.testing.assert_close(pair_divergence(flat, hidden, weight, VocabShard.whole(6)).kl,
                               exact_kl(flat, hidden, weight).float())
    torch.testing.assert_close(pair_divergence(hidden, flat, weight, VocabShard.whole(6)).kl,
                               torch.full((6,), math.log(6)))


def test_targets_log_probs_are_those_of_both_sides():
    hidden_p, hidden_q, weight, _ = pair(9, 4, 31, torch.float64)
    targets = torch.tensor([3, 30, 0, -100, 7, 7, 1, 29, 12])
    plain = pair_divergence(hidden_p, hidden_q, weight, VocabShard.whole(31))
    scores = pair_divergence(hidden_p, hidden_q, weight, VocabShard.whole(31), targets=targets, blocks=Blocks(4, 7))
    for found, hidden in ((scores.logprobs_p, hidden_p), (scores.logprobs_q, hidden_q)):
        expected = dense_log_softmax(hidden, weight).gather(1, targets.clamp_min(0)[:, None])[:, 0]
        torch.testing.assert_close(found, expected.where(targets >= 0, 0))
    for name in ("jsd", "entropy_gap", "entropy_p", "entropy_q", "kl"):
        torch.testing.assert_close(getattr(scores, name), getattr(plain, name), atol=1e-14, rtol=1e-12)
    assert plain.logprobs_p is None and plain.logprobs_q is None


def test_bf16_operands():
    hidden_p, hidden_q, weight, upstream = pair(40, 16, 301, torch.bfloat16)
    values, grads = differences(hidden_p, hidden_q, weight, upstream, blocks=SMALL)
    assert max(values) < 1e-5 and max(grads) < 2**-8


def test_rows_without_an_upstream_gradient_have_none():
    hidden_p, hidden_q, weight, upstream = pair(12, 8, 301)
    upstream[:, ::2] = 0
    inputs = [t.requires_grad_() for t in (hidden_p, hidden_q)]
    scores = pair_divergence(*inputs, weight, VocabShard.whole(301), blocks=SMALL)
    for grad in gradients((scores.jsd, scores.entropy_gap), inputs, upstream):
        assert not grad[::2].any() and grad[1::2].any()


@pytest.mark.parametrize("change, message", [
    ({"hidden_q": torch.zeros(4, 4)}, "two sets of hidden states of one shape and dtype, got \\(3, 4\\)"),
    ({"hidden_q": torch.zeros(3, 4, dtype=torch.float64)}, "of one shape and dtype"),
    ({"weight": torch.zeros(6, 5)}, "of one width"),
    ({"temperature": -1.0}, "temperature must be above 0"),
    ({"targets": torch.tensor([0, 1])}, "expected 3 targets, got shape"),
    ({"targets": torch.tensor([0, 6, 1])}, "targets must lie in 0..5 .* got 6 in row 1"),
    ({"hidden_p": torch.full((3, 4), float("nan"))}, "expected finite hidden states"),
])
def test_bad_input(change, message):
    fields = {"hidden_p": torch.zeros(3, 4), "hidden_q": torch.zeros(3, 4), "weight": torch.zeros(6, 4),
              "shard": VocabShard.whole(6)}
    with pytest.raises(ValueError, match=message):
        pair_divergence(**{**fields, **change})
