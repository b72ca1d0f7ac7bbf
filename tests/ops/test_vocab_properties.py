"""Properties of the vocabulary ops over shapes that divide nothing, offsets, masks and splits of any kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megavg.ops import Blocks, HeadOptions, VocabShard, pair_divergence, token_scores
from megavg.ops.vocab_inputs import make_rows
from megavg.ops.vocab_rows import NATS
from megavg.ops.vocab_shard import TOP_ID, merge
from megavg.ops.vocab_torch import statistics
from megavg.protocols.batch import IGNORE
from tests.ops.vocab_examples import dense, dense_log_softmax, example, gradients, with_offset

COMMON = settings(max_examples=60, deadline=None)
SIZES = {"n": st.integers(1, 23), "d": st.integers(1, 9), "v": st.integers(1, 90),
         "rows": st.integers(1, 24), "columns": st.integers(1, 95)}


@COMMON
@given(**SIZES, padding=st.integers(0, 5), temperature=st.sampled_from([0.3, 1.0, 2.5]),
       offset=st.sampled_from([-300.0, 0.0, 300.0]), masked=st.sampled_from(["none", "some", "all"]),
       cache=st.sampled_from([0, 10**6]))
def test_any_shape_equals_dense(n, d, v, rows, columns, padding, temperature, offset, masked, cache):
    hidden, weight, targets, upstream = example(n, d, v, torch.float64, rows=v + padding)
    hidden, weight = with_offset(hidden, weight, offset)
    if masked != "none":
        targets[slice(None) if masked == "all" else slice(0, None, 2)] = IGNORE
    kept = targets != IGNORE
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    scores = token_scores(*inputs, targets, VocabShard(0, v + padding, v), temperature, blocks=Blocks(rows, columns),
                          options=HeadOptions(cache_bytes=cache))
    expected = dense(hidden[kept], weight, targets[kept], v, temperature)
    for ours, theirs in zip((scores.logprobs, scores.entropy), expected):
        torch.testing.assert_close(ours[kept], theirs, atol=1e-9, rtol=0)
        assert not ours[~kept].any()
    found = gradients((scores.logprobs, scores.entropy), inputs, upstream)
    for ours, theirs in zip(found, gradients(expected, inputs, upstream[:, kept])):
        if cache:  # rounded like bf16, each term by itself, which an offset of 300 in both factors magnifies
            terms = float(upstream.abs().sum()) / temperature * max(float(t.detach().abs().max()) for t in inputs)
            torch.testing.assert_close(ours, theirs, atol=2**-7 * terms * 5, rtol=0)
        else:
            torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-8)


@COMMON
@given(n=st.integers(1, 9), v=st.integers(1, 40), cuts=st.lists(st.integers(0, 40), max_size=6),
       columns=st.integers(1, 45), offset=st.sampled_from([-300.0, 0.0, 300.0]))
def test_statistics_of_any_split_merge_into_those_of_the_whole(n, v, cuts, columns, offset):
    """Empty shards and shards of one column included."""
    hidden, weight, targets, _ = example(n, 4, v, torch.float64)
    hidden, weight = with_offset(hidden, weight, offset)
    edges = [0] + sorted(min(cut, v) for cut in cuts) + [v]
    tables = []
    for start, stop in zip(edges, edges[1:]):
        rows = make_rows(hidden, weight[start:stop], None, VocabShard(start, stop, v), 1 / NATS, targets)
        tables.append(statistics(rows, Blocks(3, columns), top1=True, sum_squares=True)[0])
        tables[-1][TOP_ID] += start
    merged = merge(torch.stack(tables), top1=True, sum_squares=True)
    logp = dense_log_softmax(hidden, weight)
    torch.testing.assert_close(merged.logprobs, logp.gather(1, targets[:, None])[:, 0], atol=1e-9, rtol=0)
    torch.testing.assert_close(merged.entropy, -(logp.exp() * logp).sum(1), atol=1e-9, rtol=0)
    torch.testing.assert_close(merged.sum_squares, (2 * logp).exp().sum(1), atol=1e-9, rtol=0)
    assert torch.equal(merged.top_ids, logp.argmax(1))


@COMMON
@given(**SIZES, offset=st.sampled_from([-300.0, 300.0]))
def test_offsets_in_fp32_cost_no_more_than_the_logits_own_rounding(n, d, v, rows, columns, offset):
    hidden, weight, targets, upstream = example(n, d, v)
    inputs = [t.requires_grad_() for t in with_offset(hidden, weight, offset)]
    scores = token_scores(*inputs, targets, VocabShard.whole(v), blocks=Blocks(rows, columns))
    for ours, theirs in zip((scores.logprobs, scores.entropy), dense(hidden, weight, targets)):
        torch.testing.assert_close(ours.double(), theirs, atol=5e-4, rtol=0)
    assert all(torch.isfinite(g).all() for g in gradients((scores.logprobs, scores.entropy), inputs, upstream))


@COMMON
@given(**SIZES, scale=st.sampled_from([0.1, 1.0, 6.0]), distance=st.sampled_from([0.0, 1e-3, 1.0]))
def test_divergence_is_bounded_symmetric_and_zero_between_equals(n, d, v, rows, columns, scale, distance):
    hidden, weight, _, _ = example(n, d, v, scale=scale)
    other = hidden + distance * torch.linspace(-1, 1, n * d).view(n, d)
    blocks = Blocks(rows, columns)
    one = pair_divergence(hidden, other, weight, VocabShard.whole(v), blocks=blocks)
    two = pair_divergence(other, hidden, weight, VocabShard.whole(v), blocks=blocks)
    assert bool((one.jsd >= 0).all()) and bool((one.jsd <= 0.6931472).all())
    torch.testing.assert_close(one.jsd, two.jsd, atol=1e-6, rtol=0)
    torch.testing.assert_close(one.entropy_gap, -two.entropy_gap, atol=1e-5, rtol=0)
    if distance == 0:
        assert float(one.jsd.abs().max()) < 1e-12 and float(one.entropy_gap.abs().max()) < 1e-5


def test_no_rows_at_all():
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    scores = token_scores(hidden, weight, torch.zeros(0, dtype=torch.int64), VocabShard.whole(9))
    pair = pair_divergence(hidden, hidden, weight, VocabShard.whole(9))
    assert scores.logprobs.shape == pair.jsd.shape == (0,)
    for output in (scores.logprobs, pair.jsd):
        grads = torch.autograd.grad(output.sum(), (hidden, weight))
        assert grads[0].shape == (0, 4) and not grads[1].any()


@pytest.mark.parametrize("vocab_size", [1])
def test_a_vocabulary_of_one_token_is_certain(vocab_size):
    scores = token_scores(torch.randn(3, 2), torch.randn(vocab_size, 2), torch.zeros(3, dtype=torch.int64),
                          VocabShard.whole(vocab_size))
    assert not scores.logprobs.any() and not scores.entropy.any()
