"""Log-probs and entropies of a sharded head against a dense float64 softmax: values, gradients, shards, bad input."""

from __future__ import annotations

import pytest
import torch

from megavg.ops import Blocks, VocabShard, token_scores
from tests.ops.vocab_examples import dense, example, gradients

SHAPES = [(1, 1, 2), (7, 13, 515), (131, 5, 1), (300, 17, 97), (0, 4, 9)]  # N, D, V
TEMPERATURES = (0.3, 1.0, 2.5)


@pytest.mark.parametrize("blocks", [Blocks(64, 32), Blocks(7, 1000), None], ids=["small", "rows", "default"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_dense(shape, temperature, dtype, tolerance, blocks):
    hidden, weight, targets, upstream = example(*shape, dtype)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    copies = [t.detach().clone() for t in inputs]
    scores = token_scores(*inputs, targets, VocabShard.whole(shape[2]), temperature, blocks=blocks)
    expected = dense(*inputs, targets, shape[2], temperature)
    assert scores.logprobs.dtype == scores.entropy.dtype == dtype
    for ours, theirs in zip((scores.logprobs, scores.entropy), expected):
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=0)
    ours = gradients((scores.logprobs, scores.entropy), inputs, upstream)
    for grad, theirs in zip(ours, gradients(expected, inputs, upstream)):
        torch.testing.assert_close(grad, theirs, atol=tolerance, rtol=tolerance)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies)), "inputs were changed in place"


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradcheck(temperature):
    hidden, weight, targets, _ = example(5, 3, 7, torch.float64, rows=9)
    shard = VocabShard(0, 9, 7)

    def both(h, w):
        scores = token_scores(h, w, targets, shard, temperature)
        return scores.logprobs, scores.entropy

    assert torch.autograd.gradcheck(both, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("index", [0, 1], ids=["logprobs", "entropy"])
def test_one_output_alone_has_its_gradient(index):
    hidden, weight, targets, upstream = example(6, 4, 11, torch.float64)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    scores = token_scores(*inputs, targets, VocabShard(0, 11, 11), 0.7)
    output = (scores.logprobs, scores.entropy)[index]
    expected = dense(*inputs, targets, 11, 0.7)[index]
    for ours, theirs in zip(gradients([output], inputs, upstream), gradients([expected], inputs, upstream)):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("offset", [-300.0, 300.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_offsets_of_all_logits_change_nothing(offset, dtype, tolerance):
    """exp of such logits overflows (or is 0) in fp32; the result must be that of the logits without the offset."""
    hidden, weight, targets, upstream = example(9, 4, 31, dtype)
    shifted_hidden = torch.cat([hidden, torch.ones(9, 1, dtype=dtype)], 1).requires_grad_()
    shifted_weight = torch.cat([weight, torch.full((31, 1), offset, dtype=dtype)], 1).requires_grad_()
    scores = token_scores(shifted_hidden, shifted_weight, targets, VocabShard(0, 31, 31))
    for ours, theirs in zip((scores.logprobs, scores.entropy), dense(hidden, weight, targets, 31, 1.0)):
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=0)
    grads = gradients((scores.logprobs, scores.entropy), (shifted_hidden, shifted_weight), upstream)
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_a_certain_token_has_no_entropy():
    """One logit 600 above the others: e^-600 is 0 in fp32 and must not turn 0 * -inf into NaN."""
    hidden, weight = torch.ones(2, 1, requires_grad=True), torch.full((5, 1), -300.0)
    weight[3] = 300.0
    weight.requires_grad_()
    scores = token_scores(hidden, weight, torch.tensor([3, 0]), VocabShard(0, 5, 5))
    assert scores.logprobs.tolist() == [0.0, -600.0]
    assert scores.entropy.tolist() == [0.0, 0.0]
    for grad in gradients((scores.logprobs, scores.entropy), (hidden, weight), torch.ones(2, 2)):
        assert torch.isfinite(grad).all()


def test_uniform_distribution_has_entropy_log_v():
    scores = token_scores(torch.zeros(3, 2), torch.randn(7, 2), torch.tensor([0, 3, 6]), VocabShard(0, 7, 7))
    log_v = torch.log(torch.tensor(7.0)).expand(3)
    torch.testing.assert_close(scores.entropy, log_v)
    torch.testing.assert_close(scores.logprobs, -log_v)


def test_bf16_gives_fp32_scores_close_to_dense():
    hidden, weight, targets, upstream = example(50, 32, 201, torch.bfloat16)
    hidden.requires_grad_()
    scores = token_scores(hidden, weight.requires_grad_(), targets, VocabShard(0, 201, 201))
    assert scores.logprobs.dtype == torch.float32
    for ours, theirs in zip((scores.logprobs, scores.entropy), dense(hidden, weight, targets, 201, 1.0)):
        torch.testing.assert_close(ours.double(), theirs, atol=0.03, rtol=0)
    grads = gradients((scores.logprobs, scores.entropy), (hidden, weight), upstream)
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2
    for ours, theirs in zip(grads, gradients(dense(hidden, weight, targets, 201, 1.0), (hidden, weight), upstream)):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


def test_padding_rows_have_no_probability_and_no_gradient():
    hidden, weight, targets, upstream = example(8, 3, 5, rows=9)
    weight[5:] = 100.0
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    scores = token_scores(*inputs, targets, VocabShard(0, 9, 5))
    for ours, theirs in zip((scores.logprobs, scores.entropy), dense(*inputs, targets, 5, 1.0)):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-6)
    grad = gradients((scores.logprobs, scores.entropy), inputs, upstream)[1]
    assert grad[:5].any() and not grad[5:].any()


NAN = float("nan")
BAD_INPUT = [
    ({"hidden": torch.zeros(2, 3, 4)}, "expected hidden \\[N, D\\] and weight \\[Vs, D\\] of one width"),
    ({"weight": torch.zeros(6, 5)}, "of one width, got \\(3, 4\\) and \\(6, 5\\)"),
    ({"weight": torch.zeros(6, 4).bfloat16()}, "of one floating dtype, got torch.float32 and torch.bfloat16"),
    ({"shard": VocabShard(0, 7, 7)}, "the head has 6 rows but the shard says 0..7"),
    ({"shard": VocabShard(0, 6, 0)}, "vocab_size must be at least 1, got 0"),
    ({"shard": VocabShard(0, 6, 8)}, "the shards end at 6 but the vocabulary has 8 tokens"),
    ({"shard": VocabShard(2, 8, 8)}, "the shards leave a gap: expected one to start at 0, got 2..8"),
    ({"targets": torch.zeros(2, dtype=torch.int64)}, "expected 3 targets, got shape \\(2,\\)"),
    ({"targets": torch.zeros(3, dtype=torch.int32)}, "expected targets of dtype torch.int64, got torch.int32"),
    ({"targets": torch.tensor([0, 6, 1])}, "targets must lie in 0..5 or be -100 .ignored., got 6 in row 1"),
    ({"targets": torch.tensor([0, 1, -1])}, "targets must lie in 0..5 or be -100 .ignored., got -1 in row 2"),
    ({"targets": torch.tensor([0, -100, 1]), "ignore_index": -1}, "or be -1 .ignored., got -100 in row 1"),
    ({"shard": VocabShard(0, 6, 5), "targets": torch.tensor([0, 5, 1])}, "targets must lie in 0..4"),
    ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ({"temperature": NAN}, "temperature must be above 0, got nan"),
    ({"temperature": torch.tensor([1.0, -2.0, 1.0])}, "temperature must be above 0, got -2.0"),
    ({"temperature": torch.ones(4)}, "expected a temperature \\[3\\], got shape \\(4,\\)"),
    ({"temperature": torch.ones(3, requires_grad=True)}, "requires a gradient, which this op does not give; detach it"),
    ({"temperature": torch.tensor([1.0, torch.inf, 1.0])}, "temperature must be above 0, got inf"),
    ({"shard": VocabShard(-5, 1, 6)}, "a shard is 0 <= start <= stop, got -5..1"),
    ({"bias": torch.zeros(6, dtype=torch.int64)}, "expected a bias of a floating dtype, got torch.int64"),
    ({"sequence_parallel": True, "targets": torch.zeros(2, dtype=torch.int64)}, "expected 3 targets, those of all"),
    ({"bias": torch.zeros(5)}, "expected a bias \\[6\\], got shape \\(5,\\)"),
    ({"hidden": torch.tensor([[0.0] * 4, [1.0, NAN, 0, 0], [0, 0, 0, torch.inf]])},
     "expected finite hidden states, got NaN or infinity in 2 of 3 rows, the first of which is row 1"),
    ({"weight": torch.full((6, 4), NAN), "hidden": torch.ones(3, 4)}, "expected a finite head, got NaN or infinity"),
    ({"bias": torch.full((6,), -torch.inf)}, "expected a finite head, got NaN or infinity"),
    ({"weight": torch.full((6, 4), 1e30), "hidden": torch.full((3, 4), 1e30)}, "or products overflow"),
]


@pytest.mark.parametrize("change, message", BAD_INPUT, ids=range(len(BAD_INPUT)))
def test_bad_input(change, message):
    fields = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(6, 4), "targets": torch.zeros(3, dtype=torch.int64),
              "shard": VocabShard.whole(6), "temperature": 1.0}
    with pytest.raises(ValueError, match=message):
        token_scores(**{**fields, **change})


def test_a_backend_that_cannot_run_here_is_refused():
    from megavg.ops.vocab_backend import load_backend

    with pytest.raises(ValueError, match="backend 'cuda' is not one of auto, torch, triton"):
        load_backend("cuda", torch.device("cpu"))
    assert load_backend("auto", torch.device("cpu")).__name__.endswith("vocab_torch")


def test_options_are_checked():
    from megavg.ops import HeadOptions

    with pytest.raises(ValueError, match="cache_bytes=-1 must be a whole number"):
        HeadOptions(cache_bytes=-1)
    with pytest.raises(ValueError, match="cache_bytes=2000000000.0 must be a whole number"):
        HeadOptions(cache_bytes=2e9)
    with pytest.raises(ValueError, match="skip_mass=1.5 must be in"):
        HeadOptions(skip_mass=1.5)
    with pytest.raises(ValueError, match="tiles need at least one row and one column, got 0 x 4"):
        Blocks(0, 4)
