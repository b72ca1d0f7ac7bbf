"""The vocabulary ops over 2 and 4 ranks equal one process and float64, whatever the shards; collectives counted."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megavg.ops import Blocks, HeadOptions, VocabShard, pair_divergence, token_scores
from megavg.protocols.batch import IGNORE
from tests.distributed import run_ranks
from tests.ops.vocab_examples import dense, dense_log_softmax, dense_pair, example, gradients, relative

# rows of the head on each rank, and how many of all are real tokens
SHARDS = {
    "even": ([200, 200], 400), "uneven": ([300, 101], 401), "empty": ([401, 0], 401), "first empty": ([0, 401], 401),
    "padded": ([200, 200], 333), "all padding": ([350, 350], 340), "one column": ([400, 1], 401),
    "four even": ([100] * 4, 400), "four uneven": ([7, 250, 0, 144], 401), "four padded": ([120] * 4, 401),
}
TWO, FOUR = ([name for name, (rows, _) in SHARDS.items() if len(rows) == size] for size in (2, 4))
SKIP = 1e-6
OPTIONS = {"exact": HeadOptions(), "cached": HeadOptions(cache_bytes=10**8), "skipping": HeadOptions(skip_mass=SKIP)}
BLOCKS = Blocks(32, 64)


def case(name: str, dtype=torch.float32):
    rows, vocab_size = SHARDS[name]
    return (*example(132, 16, vocab_size, dtype, rows=sum(rows), scale=6.0), vocab_size)


def my_shard(name: str) -> VocabShard:
    rows, vocab_size = SHARDS[name]
    start = sum(rows[:dist.get_rank()])
    return VocabShard(start, start + rows[dist.get_rank()], vocab_size, dist.group.WORLD)


@pytest.fixture(scope="module")
def found():
    """What every rank found: {world size: [{shards: {...}}]}."""
    return {2: run_ranks(2, _all_cases, TWO), 4: run_ranks(4, _all_cases, FOUR)}


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_ranks_equal_dense(found, name, options):
    """Log-prob and entropy within 2e-5 at |z| up to 40, gradients within 1e-5 relative; 4e-3 from the cache."""
    hidden, weight, targets, upstream, vocab_size = case(name)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    expected = dense(*inputs, targets, vocab_size, 0.7)
    grad_hidden, grad_weight = gradients(expected, inputs, upstream)
    bound = {"exact": 1e-5, "cached": 4e-3, "skipping": 2e-5}[options]
    ranks = [rank[name][options] for rank in found[len(SHARDS[name][0])]]
    for rank in ranks:
        torch.testing.assert_close(rank["logprobs"].double(), expected[0], atol=2e-5, rtol=0)
        torch.testing.assert_close(rank["entropy"].double(), expected[1], atol=2e-5, rtol=0)
        assert relative(rank["grad_hidden"], grad_hidden) < bound
    assert relative(torch.cat([rank["grad_weight"] for rank in ranks]), grad_weight) < bound


@pytest.mark.parametrize("name", SHARDS)
def test_ranks_equal_one_process(found, name):
    hidden, weight, targets, upstream, vocab_size = case(name)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    scores = token_scores(*inputs, targets, VocabShard(0, len(weight), vocab_size), 0.7, blocks=BLOCKS)
    grads = gradients((scores.logprobs, scores.entropy), inputs, upstream)
    for rank in found[len(SHARDS[name][0])]:
        rank = rank[name]["exact"]
        torch.testing.assert_close(rank["logprobs"], scores.logprobs, atol=1e-5, rtol=0)
        torch.testing.assert_close(rank["entropy"], scores.entropy, atol=1e-5, rtol=0)
        assert relative(rank["grad_hidden"], grads[0]) < 2e-6


@pytest.mark.parametrize("name", SHARDS)
def test_all_ranks_have_the_same_bits(found, name):
    first, *others = [rank[name]["exact"] for rank in found[len(SHARDS[name][0])]]
    for other in others:
        for key in ("logprobs", "entropy", "grad_hidden", "top_ids", "sum_squares"):
            assert torch.equal(first[key], other[key])


@pytest.mark.parametrize("name", SHARDS)
def test_top_1_over_ranks(found, name):
    hidden, weight, _, _, vocab_size = case(name)
    expected = (hidden.double() @ weight[:vocab_size].double().T).argmax(1)
    assert torch.equal(found[len(SHARDS[name][0])][0][name]["exact"]["top_ids"], expected)


@pytest.mark.parametrize("name", SHARDS)
def test_dropped_mass_is_each_ranks_own(found, name):
    """The mass of the light blocks of a rank's own columns that do not hold the target."""
    hidden, weight, targets, _, vocab_size = case(name)
    p = dense_log_softmax(hidden, weight, vocab_size, 0.7).exp()
    rows, start, total = SHARDS[name][0], 0, 0.0
    for rank, size in zip(found[len(rows)], rows):
        expected = torch.zeros(len(hidden), dtype=torch.float64)
        for first in range(start, min(start + size, vocab_size), BLOCKS.columns):
            stop = min(first + BLOCKS.columns, start + size, vocab_size)
            mass = p[:, first:stop].sum(1)
            expected += torch.where((mass < SKIP) & ~((targets >= first) & (targets < stop)), mass, 0)
        torch.testing.assert_close(rank[name]["skipping"]["dropped"].double(), expected, atol=1e-9, rtol=1e-3)
        start, total = start + size, total + float(expected.sum())
    assert total > 0


@pytest.mark.parametrize("name", SHARDS)
def test_sequence_parallel_gives_each_rank_its_rows_of_the_gradient(found, name):
    ranks = [rank[name] for rank in found[len(SHARDS[name][0])]]
    for rank in ranks:
        assert torch.equal(rank["sequence parallel"]["logprobs"], ranks[0]["exact"]["logprobs"])
        assert torch.equal(rank["sequence parallel"]["grad_weight"], rank["exact"]["grad_weight"])
    grad = torch.cat([rank["sequence parallel"]["grad_hidden"] for rank in ranks])
    torch.testing.assert_close(grad, ranks[0]["exact"]["grad_hidden"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", SHARDS)
def test_pair_divergence_over_ranks(found, name):
    hidden, weight, _, upstream, vocab_size = case(name)
    other = hidden.flip(0) * 0.9
    inputs = hidden.requires_grad_(), other.detach().requires_grad_(), weight[:vocab_size].detach().requires_grad_()
    expected = dense_pair(*inputs)
    grads = gradients(expected, inputs, upstream)
    ranks = [rank[name]["pair"] for rank in found[len(SHARDS[name][0])]]
    for rank in ranks:
        torch.testing.assert_close(rank["jsd"].double(), expected[0], atol=2e-5, rtol=0)
        torch.testing.assert_close(rank["gap"].double(), expected[1], atol=2e-5, rtol=0)
        assert relative(rank["grad_p"], grads[0]) < 1e-4 and relative(rank["grad_q"], grads[1]) < 1e-4
        assert all(torch.equal(rank[key], ranks[0][key]) for key in ("jsd", "gap", "grad_p", "grad_q"))
    assert relative(torch.cat([rank["grad_weight"] for rank in ranks])[:vocab_size], grads[2]) < 1e-4


def test_one_gather_and_one_reduction_whatever_the_number_of_tokens(found):
    for ranks in found.values():
        for rank in ranks:
            counts = rank["collectives"]
            assert counts["scores"] == {n: (["all_gather_into_tensor"], ["all_reduce"]) for n in (1, 132, 3000)}
            # the hidden states are gathered before the statistics, and again rather than kept
            assert counts["sequence parallel"] == (["all_gather_into_tensor"] * 2,
                                                   ["all_gather_into_tensor", "reduce_scatter_tensor"])
            assert counts["pair"] == (["all_gather_into_tensor", "all_reduce"], ["all_reduce"])


def test_errors_that_only_the_whole_group_can_see_are_the_same_on_every_rank(found):
    for ranks in found.values():
        for errors in zip(*(rank["errors"].items() for rank in ranks)):
            assert len({message for _, message in errors}) == 1
        errors = ranks[0]["errors"]
        assert "the shards overlap: expected one to start at 10, got 9.." in errors["overlap"]
        assert "the shards leave a gap: expected one to start at 10, got 11.." in errors["gap"]
        assert "disagree on the vocabulary's size" in errors["sizes"]
        assert "were given different targets" in errors["targets"] and errors["targets"] == errors["ignored"]
        assert "expected finite hidden states, got NaN or infinity in 1 of 6 rows" in errors["hidden"]


def _all_cases(names: list[str]) -> dict:
    found = {name: {**{label: _scored(name, options) for label, options in OPTIONS.items()},
                    "sequence parallel": _sequence_parallel(name), "pair": _pair(name)} for name in names}
    return {**found, "collectives": _count_collectives(names[0]), "errors": _errors()}


def _scored(name: str, options: HeadOptions) -> dict:
    hidden, weight, targets, upstream, _ = case(name)
    shard = my_shard(name)
    inputs = hidden.requires_grad_(), weight[shard.start:shard.stop].clone().requires_grad_()
    scores = token_scores(*inputs, targets, shard, 0.7, options=options, blocks=BLOCKS, top1=True, sum_squares=True)
    grads = gradients((scores.logprobs, scores.entropy), inputs, upstream)
    return {"logprobs": scores.logprobs.detach(), "entropy": scores.entropy.detach(), "grad_hidden": grads[0],
            "grad_weight": grads[1], "top_ids": scores.top_ids, "sum_squares": scores.sum_squares,
            "dropped": scores.dropped_mass}


def _sequence_parallel(name: str) -> dict:
    hidden, weight, targets, upstream, _ = case(name)
    shard = my_shard(name)
    part = hidden.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    inputs = part, weight[shard.start:shard.stop].clone().requires_grad_()
    scores = token_scores(*inputs, targets, shard, 0.7, blocks=BLOCKS, sequence_parallel=True, top1=True)
    grads = gradients((scores.logprobs, scores.entropy), inputs, upstream)
    return {"logprobs": scores.logprobs.detach(), "grad_hidden": grads[0], "grad_weight": grads[1]}


def _pair(name: str) -> dict:
    hidden, weight, _, upstream, _ = case(name)
    shard = my_shard(name)
    inputs = (hidden.requires_grad_(), (hidden.flip(0) * 0.9).detach().requires_grad_(),
              weight[shard.start:shard.stop].clone().requires_grad_())
    scores = pair_divergence(*inputs, shard, blocks=BLOCKS)
    grads = gradients((scores.jsd, scores.entropy_gap), inputs, upstream)
    return {"jsd": scores.jsd.detach(), "gap": scores.entropy_gap.detach(), "grad_p": grads[0], "grad_q": grads[1],
            "grad_weight": grads[2]}


def _count_collectives(name: str) -> dict:
    called: list[str] = []
    names = [n for n in ("all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor", "broadcast", "all_gather",
                         "all_to_all_single", "reduce", "barrier") if hasattr(dist, n)]
    originals = {n: getattr(dist, n) for n in names}

    def watched(n):
        def wrapper(*args, **keywords):
            called.append(n)
            return originals[n](*args, **keywords)
        return wrapper

    def both(outputs) -> tuple[list[str], list[str]]:
        forward = list(called)
        sum(output.sum() for output in outputs).backward()
        backward = called[len(forward):]
        called.clear()
        return forward, backward

    shard, world = my_shard(name), dist.get_world_size()
    weight = torch.randn(shard.stop - shard.start, 8, requires_grad=True)
    try:
        for n in names:
            setattr(dist, n, watched(n))
        scores = {}
        for num_tokens in (1, 132, 3000):
            hidden = torch.ones(num_tokens, 8, requires_grad=True)
            result = token_scores(hidden, weight, torch.full((num_tokens,), 5), shard, blocks=BLOCKS)
            scores[num_tokens] = both((result.logprobs, result.entropy))
        result = token_scores(torch.ones(6, 8, requires_grad=True), weight, torch.full((6 * world,), 5), shard,
                              sequence_parallel=True)
        scattered = both((result.logprobs, result.entropy))
        result = pair_divergence(torch.ones(6, 8, requires_grad=True), torch.zeros(6, 8), weight, shard)
        return {"scores": scores, "sequence parallel": scattered, "pair": both((result.jsd, result.entropy_gap))}
    finally:
        for n in names:
            setattr(dist, n, originals[n])


def _errors() -> dict[str, str]:
    """Messages of calls that only the whole group can see to be wrong."""
    rank, world = dist.get_rank(), dist.get_world_size()
    hidden, targets = torch.ones(6, 4), torch.tensor([0, 1, 2, 3, 4, IGNORE])
    broken = hidden.clone()
    broken[2, 1] = float("nan")
    size = 10 * world

    def shard(shift: int = 0, vocab_size: int = size) -> VocabShard:
        start = 10 * rank + (shift if rank == 1 else 0)
        return VocabShard(start, 10 * rank + 10, vocab_size, dist.group.WORLD)

    calls = {"overlap": (hidden, targets, shard(-1)), "gap": (hidden, targets, shard(1)),
             "sizes": (hidden, targets, shard(vocab_size=size - rank % 2)),
             "targets": (hidden, targets.roll(rank), shard()),
             "ignored": (hidden, torch.where(targets == rank, IGNORE, targets), shard()), "hidden": (broken, targets, shard())}
    messages = {}
    for name, (states, ids, its_shard) in calls.items():
        try:
            token_scores(states, torch.ones(its_shard.stop - its_shard.start, 4), ids, its_shard)
        except ValueError as error:
            messages[name] = str(error)
    return messages
