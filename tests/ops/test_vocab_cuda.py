"""The vocabulary ops on a GPU, by both backends, against float64. Skipped where there is none."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megavg.ops import Blocks, HeadOptions, VocabShard, pair_divergence, token_scores
from tests.ops.vocab_examples import dense, dense_pair, example, gradients, relative

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
BACKENDS = [pytest.param("torch"), pytest.param("triton", marks=pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"))]
OPTIONS = {"exact": {}, "cached": {"cache_bytes": 10**8}, "skipping": {"skip_mass": 1e-6}}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [None, Blocks(64, 640)], ids=["default", "small"])
def test_equals_float64(backend, options, dtype, blocks):
    hidden, weight, targets, upstream = (t.cuda() for t in example(500, 136, 5003, dtype, scale=4.0))
    targets[::7] = -100
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    scores = token_scores(*inputs, targets, VocabShard.whole(5003), 0.8, top1=True, blocks=blocks,
                          options=HeadOptions(backend, **OPTIONS[options]))
    kept = targets != -100
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = dense(exact[0][kept], exact[1], targets[kept], temperature=0.8)
    for ours, theirs in zip((scores.logprobs, scores.entropy), expected):
        torch.testing.assert_close(ours[kept].double(), theirs, atol=5e-5, rtol=0)
    bound = 2e-2 if dtype == torch.bfloat16 or options == "cached" else 2e-5
    theirs = gradients(expected, exact, upstream[:, kept])
    for found, wanted in zip(gradients((scores.logprobs, scores.entropy), inputs, upstream), theirs):
        assert relative(found, wanted) < bound


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_pair_divergence(dtype, bound):
    hidden, weight, _, upstream = (t.cuda() for t in example(300, 64, 3001, dtype, scale=3.0))
    inputs = [t.detach().requires_grad_() for t in (hidden, hidden.flip(0), weight)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    scores = pair_divergence(*inputs, VocabShard.whole(3001))
    expected = dense_pair(*exact)
    torch.testing.assert_close(scores.jsd.double(), expected[0], atol=2e-5, rtol=0)
    for found, wanted in zip(gradients((scores.jsd, scores.entropy_gap), inputs, upstream),
                             gradients(expected, exact, upstream)):
        assert relative(found, wanted) < bound
