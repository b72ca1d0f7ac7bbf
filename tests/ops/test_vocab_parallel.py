"""Log-probs and entropies of a sharded head against a dense float64 softmax: values, gradients, shards, bad input."""

from __future__ import annotations


import pytest
import torch
import torch.distributed as dist

from megavg.ops import vocab_parallel
from megavg.ops.vocab_parallel import VocabShard, token_scores
from tests.distributed import run_ranks

SHAPES = [(1, 1, 2), (7, 13, 515), (131, 5, 1), (300, 17, 97), (0, 4, 9)]  # N, D, V
TEMPERATURES = (0.3, 1.0, 2.5)
# rows of the head on rank 0, on rank 1, and how many of them are real tokens
SHARDS = {"even": (5, 5, 10), "uneven": (7, 2, 9), "empty": (9, 0, 9), "first empty": (0, 9, 9),
          "padded": (5, 5, 9), "all padding": (6, 6, 6)}


def dense(hidden, weight, targets, vocab_size: int, temperature: float):
    """(log-prob, entropy), each [N] float64, with all logits stored."""
    logp = (hidden.double() @ weight.double()[:vocab_size].T / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def example(num_tokens: int, dim: int, vocab_size: int, dtype=torch.float32, rows: int | None = None):
    """hidden [N, D], weight [rows, D], targets [N], and upstream gradients of log-prob and entropy [N]."""
    generator = torch.Generator().manual_seed(num_tokens + dim + vocab_size)
    # logits of deviation 1 / temperature, whatever the width
    hidden = (torch.randn(num_tokens, dim, generator=generator, dtype=torch.float64) / dim**0.5).to(dtype)
    weight = torch.randn(rows or vocab_size, dim, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
    upstream = torch.randn(2, num_tokens, generator=generator, dtype=torch.float64)
    return hidden, weight, targets, upstream


def gradients(outputs, inputs, upstream):
    loss = sum((output.double() * part).sum() for output, part in zip(outputs, upstream))
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("chunk_bytes", [1, vocab_parallel._CHUNK_BYTES], ids=["chunks of 128", "one chunk"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_dense(monkeypatch, shape, temperature, dtype, tolerance, chunk_bytes):
    monkeypatch.setattr(vocab_parallel, "_CHUNK_BYTES", chunk_bytes)
    hidden, weight, targets, upstream = example(*shape, dtype)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    copies = [t.detach().clone() for t in inputs]
    scores = token_scores(*inputs, targets, VocabShard(0, shape[2], shape[2]), temperature)
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


@pytest.mark.parametrize("change, message", [
    ({"hidden": torch.zeros(2, 3, 4)}, "expected hidden \\[N, D\\] and weight \\[Vs, D\\] of one width"),
    ({"weight": torch.zeros(6, 5)}, "of one width, got \\(3, 4\\) and \\(6, 5\\)"),
    ({"shard": VocabShard(0, 7, 7)}, "the head has 6 rows but the shard says 0..7"),
    ({"targets": torch.zeros(2, dtype=torch.int64)}, "expected 3 targets, got shape \\(2,\\)"),
    ({"targets": torch.tensor([0, 6, 1])}, "targets must lie in 0..5, got 0..6"),
    ({"targets": torch.tensor([0, -100, 1])}, "targets must lie in 0..5, got -100..1"),
    ({"shard": VocabShard(0, 6, 5), "targets": torch.tensor([0, 5, 1])}, "targets must lie in 0..4"),
    ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
])
def test_bad_input(change, message):
    fields = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(6, 4), "targets": torch.zeros(3, dtype=torch.int64),
              "shard": VocabShard(0, 6, 6), "temperature": 1.0}
    with pytest.raises(ValueError, match=message):
        token_scores(**{**fields, **change})


@pytest.fixture(scope="module")
def on_two_ranks():
    return run_ranks(2, _score_shards)


@pytest.mark.parametrize("shards", SHARDS)
def test_two_ranks_equal_dense(on_two_ranks, shards):
    first, second, vocab_size = SHARDS[shards]
    hidden, weight, targets, upstream = example(130, 6, vocab_size, rows=first + second)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    expected = dense(*inputs, targets, vocab_size, 0.7)
    grad_hidden, grad_weight = gradients(expected, inputs, upstream)
    for rank, rows in enumerate((slice(0, first), slice(first, None))):
        found = on_two_ranks[rank][shards]
        torch.testing.assert_close(found["logprobs"].double(), expected[0], atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(found["entropy"].double(), expected[1], atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(found["grad_hidden"], grad_hidden, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(found["grad_weight"], grad_weight[rows], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shards", SHARDS)
def test_both_ranks_get_the_same_bits(on_two_ranks, shards):
    for name in ("logprobs", "entropy", "grad_hidden"):
        assert torch.equal(on_two_ranks[0][shards][name], on_two_ranks[1][shards][name])


def _score_shards() -> bytes:
    """Pickled here by value: a tensor in torch's queue lives only as long as the process that put it there."""
    rank, found = dist.get_rank(), {}
    for name, (first, second, vocab_size) in SHARDS.items():
        hidden, weight, targets, upstream = example(130, 6, vocab_size, rows=first + second)
        start, stop = ((0, first), (first, first + second))[rank]
        inputs = hidden.requires_grad_(), weight[start:stop].clone().requires_grad_()
        scores = token_scores(*inputs, targets, VocabShard(start, stop, vocab_size, dist.group.WORLD), 0.7)
        grads = gradients((scores.logprobs, scores.entropy), inputs, upstream)
        found[name] = {"logprobs": scores.logprobs.detach(), "entropy": scores.entropy.detach(),
                       "grad_hidden": grads[0], "grad_weight": grads[1]}
    return found
