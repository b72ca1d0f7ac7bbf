"""Errors found in published ways to compute log-probs and entropies of a head; ours must not have them.

Each test names what it caught elsewhere. What needs several ranks is in test_vocab_ranks.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from megavg.ops import Blocks, HeadOptions, VocabShard, token_scores
from tests.ops.vocab_examples import dense, example, gradients, relative, with_offset


def scored(hidden, weight, targets, upstream, **keywords):
    """Scores and gradients of ours, and of the dense float64 head."""
    inputs = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    scores = token_scores(*inputs, targets, VocabShard.whole(weight.shape[0]), **keywords)
    expected = dense(*inputs, targets)
    return (scores, gradients((scores.logprobs, scores.entropy), inputs, upstream), expected,
            gradients(expected, inputs, upstream))


@pytest.mark.parametrize("vocab_size, offset", [(2304, 0.0), (2304, -12.0), (19008, -12.0)])
def test_1_no_phantom_columns_beyond_the_vocabulary(vocab_size, offset):
    """A kernel without a mask counts the tail of its last block as logits of 0: 9.95 off at an offset of -12."""
    hidden, weight, targets, upstream = example(6, 8, vocab_size)
    hidden, weight = with_offset(hidden, weight, offset)
    scores, found, expected, theirs = scored(hidden, weight, targets, upstream)
    torch.testing.assert_close(scores.logprobs.double(), expected[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(scores.entropy.double(), expected[1], atol=2e-5, rtol=0)
    assert max(relative(a, b) for a, b in zip(found, theirs)) < 1e-5


@pytest.mark.parametrize("offset", [-120.0, -3000.0, 3000.0])
def test_2_the_running_maximum_does_not_start_at_zero(offset):
    """A maximum that starts at 0 gives -inf and NaN once all logits are below -100."""
    hidden, weight, targets, upstream = example(6, 8, 2048)
    scores, found, expected, _ = scored(*with_offset(hidden, weight, offset), targets, upstream)
    tolerance = abs(offset) * 1e-6  # of the logits themselves in fp32
    torch.testing.assert_close(scores.logprobs.double(), expected[0], atol=tolerance, rtol=0)
    torch.testing.assert_close(scores.entropy.double(), expected[1], atol=tolerance, rtol=0)
    assert all(torch.isfinite(grad).all() for grad in found)


def test_3_hidden_states_gradient_is_summed_up_in_fp32():
    """Summed up in bf16 over many blocks, its error grows far beyond the one rounding of the result."""
    hidden, weight, targets, upstream = example(32, 16, 6000, torch.bfloat16)
    _, found, _, theirs = scored(hidden, weight, targets, upstream, blocks=Blocks(32, 8))
    assert relative(found[0], theirs[0]) < 2**-8


def test_4_the_entropy_has_a_gradient():
    """An entropy bonus without one does nothing, and nothing says so."""
    hidden, weight, targets, upstream = example(20, 8, 301)
    upstream[0] = 0
    _, found, _, theirs = scored(hidden, weight, targets, upstream)
    assert float(theirs[0].norm()) > 0.1
    assert max(relative(a, b) for a, b in zip(found, theirs)) < 1e-5


def test_5_bf16_operands_give_fp32_scores_and_a_weight_gradient_rounded_once():
    """Log-probs in bf16 are off by up to 0.03; dW summed up in bf16 over chunks of tokens loses small terms."""
    hidden, weight, targets, upstream = example(3000, 16, 301, torch.bfloat16)
    scores, found, expected, theirs = scored(hidden, weight, targets, upstream, blocks=Blocks(64, 64))
    assert scores.logprobs.dtype == scores.entropy.dtype == torch.float32
    torch.testing.assert_close(scores.logprobs.double(), expected[0], atol=5e-6, rtol=0)
    torch.testing.assert_close(scores.entropy.double(), expected[1], atol=5e-6, rtol=0)
    assert found[1].dtype == torch.bfloat16 and relative(found[1], theirs[1]) < 2**-8


def test_6_entropy_is_not_negative():
    """One library's is sum p log p. (Collectives, which grew with the chunks there, are counted elsewhere.)"""
    hidden, weight, targets, _ = example(30, 8, 301)
    assert bool((token_scores(hidden, weight, targets, VocabShard.whole(301)).entropy > 0).all())


@pytest.mark.parametrize("options, bound", [(HeadOptions(), 1e-6), (HeadOptions(cache_bytes=10**9), 4e-3)],
                         ids=["exact", "cached"])
@pytest.mark.parametrize("scale", [1.0, 4.0, 10.0])
def test_7_the_gradient_of_a_rows_logits_sums_to_zero(scale, options, bound):
    """An entropy that is saved in bf16 leaves a rest in every row. A bias that one row has to itself shows its logits'
    gradient; its sum is measured against that of the absolute terms."""
    hidden, weight, targets, upstream = example(24, 8, 3001, scale=scale)
    for row in range(24):
        bias = torch.zeros(3001, requires_grad=True)
        scores = token_scores(hidden[row:row + 1], weight, targets[row:row + 1], VocabShard.whole(3001), bias=bias,
                              options=options)
        dz = gradients((scores.logprobs, scores.entropy), [bias], upstream[:, row:row + 1])[0].double()
        assert abs(float(dz.sum())) < bound * float(dz.abs().sum())


def test_8_gradients_are_never_bf16_on_the_way():
    """Stored logits whose gradient is cast to bf16, whatever the dtype, have an error of 2e-3."""
    hidden, weight, targets, upstream = example(40, 8, 301, scale=4.0)
    _, found, _, theirs = scored(hidden, weight, targets, upstream)
    assert [grad.dtype for grad in found] == [torch.float32] * 2
    assert max(relative(a, b) for a, b in zip(found, theirs)) < 2e-6


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_9_tiles_never_degenerate(device):
    """Chunks of N D / V tokens become 8 to 16 rows where D is far below V: products bound by memory, 60 x slower."""
    for num_rows in (0, 1, 7, 2048, 10**5, 10**7):
        blocks = Blocks.default(num_rows, torch.device(device))
        assert blocks.rows >= 512 and blocks.columns >= 256
        if num_rows <= 16384:  # beyond, the gradient of 256 columns is still below a quarter of a hidden state of 1024
            assert num_rows * blocks.columns * 4 <= (2**24 if device == "cpu" else 2**30)


def test_values_are_as_exact_as_fp32_logits_allow():
    """|z| up to 50: log-prob and entropy within 2e-5 of float64, gradients within 1e-5."""
    hidden, weight, targets, upstream = example(64, 64, 4001, scale=12.0)
    assert 45 < float((hidden @ weight.T).abs().max()) < 75
    scores, found, expected, theirs = scored(hidden, weight, targets, upstream)
    torch.testing.assert_close(scores.logprobs.double(), expected[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(scores.entropy.double(), expected[1], atol=2e-5, rtol=0)
    assert max(relative(a, b) for a, b in zip(found, theirs)) < 1e-5


def test_uniform_rows_have_the_entropy_of_the_vocabulary():
    scores = token_scores(torch.zeros(2, 3), torch.randn(5000, 3), torch.tensor([0, 4999]), VocabShard.whole(5000))
    torch.testing.assert_close(scores.entropy, torch.full((2,), math.log(5000)))
