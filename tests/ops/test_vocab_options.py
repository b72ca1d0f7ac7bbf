"""What the op takes and gives beyond the plain call: masks, bias, temperatures, top-1, cache, skipped mass."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megavg.ops import Blocks, HeadOptions, VocabShard, token_scores
from megavg.ops.vocab_inputs import make_rows
from megavg.ops.vocab_rows import NATS
from megavg.ops.vocab_shard import MOMENT, SUM
from megavg.ops.vocab_torch import statistics
from megavg.protocols.batch import IGNORE
from tests.ops.vocab_examples import both_gradients, dense, dense_log_softmax, example, gradients, relative

SHARD = VocabShard.whole(301)
SMALL = Blocks(16, 32)


class CountedProducts(TorchDispatchMode):
    """Counts the floating-point operations of matrix products."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def test_ignored_rows_score_zero_have_no_gradient_and_cost_nothing():
    hidden, weight, targets, upstream = example(60, 8, 301)
    masked = targets.clone()
    masked[::3] = IGNORE
    kept = masked != IGNORE
    with CountedProducts() as all_rows:
        whole = gradients_of(hidden, weight, targets, upstream)
    hidden[::3] = float("nan")  # not even looked at
    with CountedProducts() as some_rows:
        part = gradients_of(hidden, weight, masked, upstream)
    assert some_rows.flops == all_rows.flops * 2 / 3
    for name in ("logprobs", "entropy", "grad_hidden"):
        assert torch.equal(part[name][kept], whole[name][kept])
        assert not part[name][~kept].any()
    expected = gradients(dense(hidden[kept], weight, targets[kept]), [weight], upstream[:, kept])[0]
    assert relative(part["grad_weight"], expected) < 1e-6


def gradients_of(hidden, weight, targets, upstream, **options):
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.requires_grad_()
    scores = token_scores(hidden, weight, targets, SHARD, blocks=SMALL, **options)
    grads = gradients((scores.logprobs, scores.entropy), (hidden, weight), upstream)
    return {"logprobs": scores.logprobs.detach(), "entropy": scores.entropy.detach(), "grad_hidden": grads[0],
            "grad_weight": grads[1]}


def test_all_rows_ignored():
    hidden, weight, targets, upstream = example(5, 8, 301)
    found = gradients_of(hidden, weight, torch.full_like(targets, IGNORE), upstream)
    assert not any(tensor.any() for tensor in found.values())


def test_rows_without_an_upstream_gradient_cost_nothing_in_the_backward():
    hidden, weight, targets, upstream = example(60, 8, 301)
    upstream[:, ::2] = 0
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    scores = token_scores(*inputs, targets, SHARD, blocks=SMALL)
    with CountedProducts() as counted:
        found = gradients((scores.logprobs, scores.entropy), inputs, upstream)
    assert counted.flops == 3 * 2 * 30 * 8 * 301
    for ours, theirs in zip(found, gradients(dense(*inputs, targets), inputs, upstream)):
        assert relative(ours, theirs) < 1e-6
    assert not found[0][::2].any()


def test_no_upstream_gradient_at_all():
    hidden, weight, targets, upstream = example(6, 8, 301)
    found = gradients_of(hidden, weight, targets, torch.zeros_like(upstream))
    assert not found["grad_hidden"].any() and not found["grad_weight"].any()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_costs_no_product(frozen):
    hidden, weight, targets, upstream = example(20, 8, 301)
    trained = weight if frozen == "hidden" else hidden
    trained.requires_grad_()
    scores = token_scores(hidden, weight, targets, SHARD, blocks=SMALL)
    with CountedProducts() as counted:
        found, = gradients((scores.logprobs, scores.entropy), [trained], upstream)
    assert counted.flops == 2 * 2 * 20 * 8 * 301
    assert relative(found, gradients(dense(hidden, weight, targets), [trained], upstream)[0]) < 1e-6


@pytest.mark.parametrize("per_row", [False, True])
def test_bias_and_temperature(per_row):
    hidden, weight, targets, upstream = example(40, 8, 301, torch.float64, rows=320)
    temperature = torch.linspace(0.3, 3, 40) if per_row else 0.7
    bias = torch.linspace(-4, 4, 320, dtype=torch.float64)
    shard = VocabShard(0, 320, 301)

    def score(h, w, b):
        scores = token_scores(h, w, targets, shard, temperature, bias=b, blocks=SMALL)
        return scores.logprobs, scores.entropy

    def reference(h, w, b):
        return dense(h, w, targets, 301, temperature, b)

    # a temperature is held in fp32
    for ours, theirs in zip(score(hidden, weight, bias), reference(hidden, weight, bias)):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    ours, theirs = both_gradients(score, reference, (hidden, weight, bias), upstream)
    for found, expected in zip(ours, theirs):
        assert relative(found, expected) < 1e-12
    assert not ours[2][301:].any()


def test_gradcheck_with_bias_and_temperatures():
    hidden, weight, targets, _ = example(4, 3, 7, torch.float64, rows=9)
    bias = torch.linspace(-1, 1, 9, dtype=torch.float64)
    targets[1] = IGNORE
    temperature = torch.tensor([0.5, 1.0, 2.0, 0.7], dtype=torch.float64)

    def both(h, w, b):
        scores = token_scores(h, w, targets, VocabShard(0, 9, 7), temperature, bias=b, blocks=Blocks(2, 3))
        return scores.logprobs, scores.entropy

    assert torch.autograd.gradcheck(both, [t.requires_grad_() for t in (hidden, weight, bias)])


@pytest.mark.parametrize("blocks", [SMALL, None], ids=["small", "default"])
def test_top_1_and_sum_of_squares(blocks):
    hidden, weight, targets, _ = example(50, 8, 301, scale=3.0)
    with CountedProducts() as plain:
        token_scores(hidden, weight, targets, SHARD, blocks=blocks)
    with CountedProducts() as extra:
        scores = token_scores(hidden, weight, targets, SHARD, top1=True, sum_squares=True, blocks=blocks)
    assert plain.flops == extra.flops
    logp = dense_log_softmax(hidden, weight)
    assert torch.equal(scores.top_ids, logp.argmax(1))
    torch.testing.assert_close(scores.top_logprobs.double(), logp.amax(1), atol=2e-6, rtol=0)
    torch.testing.assert_close(scores.sum_squares.double(), (2 * logp).exp().sum(1), atol=2e-6, rtol=0)


def test_among_equals_the_lowest_id_is_the_top_one():
    scores = token_scores(torch.ones(2, 3), torch.ones(90, 3), torch.tensor([0, 89]), VocabShard.whole(90), top1=True,
                          sum_squares=True, blocks=SMALL)
    assert scores.top_ids.tolist() == [0, 0]
    torch.testing.assert_close(scores.sum_squares, torch.full((2,), 1 / 90))


def test_a_tied_head_collects_both_gradients():
    _, weight, targets, upstream = example(30, 8, 301, torch.float64)
    ids = torch.arange(30)

    def score(w):
        scores = token_scores(w[ids] / 3, w, targets, SHARD, blocks=SMALL)
        return scores.logprobs, scores.entropy

    ours, theirs = both_gradients(score, lambda w: dense(w[ids] / 3, w, targets), [weight], upstream)
    assert relative(ours[0], theirs[0]) < 1e-12


@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("which", ["both", "logprobs", "entropy"])
def test_the_cache_saves_a_product_and_rounds_like_bf16(share, which):
    hidden, weight, targets, upstream = example(64, 8, 320, scale=2.0)
    upstream[{"both": [], "logprobs": [1], "entropy": [0]}[which]] = 0
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    options = HeadOptions(cache_bytes=int(share * 2 * 64 * 320))
    scores = token_scores(*inputs, targets, VocabShard.whole(320), blocks=Blocks(16, 32), options=options)
    with CountedProducts() as counted:
        found = gradients((scores.logprobs, scores.entropy), inputs, upstream)
    assert counted.flops == (3 - share) * 2 * 64 * 8 * 320
    for ours, theirs in zip(found, gradients(dense(*inputs, targets), inputs, upstream)):
        assert relative(ours, theirs) < 4e-3
    exact = token_scores(hidden, weight, targets, VocabShard.whole(320))
    torch.testing.assert_close(scores.logprobs, exact.logprobs, atol=2e-6, rtol=0)


def peaked(num_tokens: int = 80):
    """Rows between certain and uncertain: blocks of 32 columns hold from 1e-30 to 1 of the probability."""
    hidden, weight, targets, upstream = example(num_tokens, 8, 301)
    hidden = hidden * torch.logspace(0, 1.2, num_tokens)[:, None]
    return hidden, weight, targets, upstream


@pytest.mark.parametrize("cache_bytes", [0, 2 * 80 * 32 * 4])
def test_skipping_drops_what_it_reports_and_not_the_work_alone(cache_bytes):
    hidden, weight, targets, upstream = peaked()
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    options = HeadOptions(skip_mass=1e-4, cache_bytes=cache_bytes)
    scores = token_scores(*inputs, targets, SHARD, blocks=SMALL, options=options)
    with CountedProducts() as counted:
        found = gradients((scores.logprobs, scores.entropy), inputs, upstream)
    assert counted.flops < 0.9 * 3 * 2 * 80 * 8 * 301
    p = dense_log_softmax(hidden, weight).exp().detach()
    expected = torch.zeros(80, dtype=torch.float64)
    for start in range(0, 301, 32):
        mass = p[:, start:start + 32].sum(1)
        left_out = (mass < 1e-4) & ~((targets >= start) & (targets < start + 32))
        expected += torch.where(left_out, mass, 0)
    torch.testing.assert_close(scores.dropped_mass.double(), expected, atol=1e-8, rtol=1e-3)
    assert 0 < float(scores.dropped_mass.max()) < 10 * 1e-4
    for ours, theirs in zip(found, gradients(dense(*inputs, targets), inputs, upstream)):
        assert relative(ours, theirs) < (4e-3 if cache_bytes else 1e-3)


def test_nothing_is_skipped_or_reported_unless_asked_for():
    hidden, weight, targets, _ = peaked()
    assert token_scores(hidden.requires_grad_(), weight, targets, SHARD).dropped_mass is None
    with torch.no_grad():  # no backward, so nothing is left out
        assert token_scores(hidden, weight, targets, SHARD, options=HeadOptions(skip_mass=0.1)).dropped_mass is None


def test_what_the_caller_changes_in_place_afterwards_changes_no_gradient():
    hidden, weight, targets, upstream = example(60, 8, 301)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    temperature = torch.linspace(0.5, 2, 60)
    expected = gradients(dense(*inputs, targets, temperature=temperature.clone()), inputs, upstream * torch.tensor(
        [[1.0], [0.5]]))
    scores = token_scores(*inputs, targets, SHARD, temperature)
    temperature.mul_(10)
    found = gradients((scores.logprobs, scores.entropy.mul_(0.5)), inputs, upstream)
    assert max(relative(a, b) for a, b in zip(found, expected)) < 1e-5


def test_a_temperature_may_be_a_tensor_of_one_number():
    hidden, weight, targets, _ = example(9, 8, 301)
    found, expected = (token_scores(hidden, weight, targets, SHARD, t) for t in (torch.tensor(0.5), 0.5))
    assert torch.equal(found.entropy, expected.entropy)


def test_autocast_changes_nothing():
    hidden, weight, targets, upstream = example(60, 16, 301)
    plain = gradients_of(hidden, weight, targets, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradients_of(hidden, weight, targets, upstream)
    assert all(torch.equal(plain[name], inside[name]) for name in plain)


def test_same_bits_in_every_run():
    hidden, weight, targets, upstream = example(300, 16, 301)
    first, second = (gradients_of(hidden, weight, targets, upstream) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_logits_that_jump_far_above_the_first_block_lose_no_digits():
    """The reference is the first block's maximum and follows the sums; a jump of 60 or 400 nats is caught."""
    hidden, weight, targets, upstream = example(4, 8, 301, torch.float64)
    bias = torch.zeros(301, dtype=torch.float64)
    bias[100], bias[200:205] = 60.0, 400.0
    bias[250] = -500.0
    expected = dense(hidden, weight, targets, bias=bias)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 6e-5)):  # 6e-5: two ulp of logits of 400
        scores = token_scores(hidden.to(dtype), weight.to(dtype), targets, SHARD, bias=bias.to(dtype), blocks=SMALL)
        for ours, theirs in zip((scores.logprobs, scores.entropy), expected):
            torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("jump", [4.0, 15.0, 60.0, 85.0])
def test_the_reference_follows_the_sums(jump):
    """After blocks that rise step by step, or in one leap, the sum stays small relative to the reference, and so exact."""
    hidden, weight, targets, _ = example(6, 8, 301)
    bias = torch.zeros(301)
    for step, start in enumerate((100, 180, 260), 1):
        bias[start:] = step * jump / 3
    rows = make_rows(hidden, weight, bias, SHARD, 1 / NATS, targets)
    table, _ = statistics(rows, SMALL)
    assert float(table[SUM].max()) < 2**8 * 301, "or digits of the moment would be lost"
    assert float((table[MOMENT] / table[SUM]).abs().max()) < 24
    assert float(table[SUM].min()) > 2**-8
