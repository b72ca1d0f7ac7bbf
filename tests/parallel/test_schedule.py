"""The order of 1F1B: every micro-batch once, in order, forward first, with few activations held."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megavg.parallel.schedule import one_forward_one_backward

sizes = st.integers(1, 8).flatmap(lambda pp: st.tuples(st.integers(1, 20), st.integers(0, pp - 1), st.just(pp)))


def run(num_micro_batches: int, pp_rank: int, pp_size: int) -> list[tuple]:
    """The work of one stage: ("F", i) and ("B", i)."""
    return [("F" if work.is_forward else "B", work.index)
            for work in one_forward_one_backward(num_micro_batches, pp_rank, pp_size)]


@settings(deadline=None)
@given(sizes)
def test_every_micro_batch_once_and_in_order(size):
    calls = run(*size)
    for kind in "FB":
        assert [call[1] for call in calls if call[0] == kind] == list(range(size[0]))
    for i in range(size[0]):
        assert calls.index(("F", i)) < calls.index(("B", i))


@settings(deadline=None)
@given(sizes)
def test_few_activations_are_held(size):
    num_micro_batches, pp_rank, pp_size = size
    held, most = 0, 0
    for call in run(*size):
        held += 1 if call[0] == "F" else -1
        most = max(most, held)
    assert most == min(pp_size - pp_rank, num_micro_batches)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(2, 6))
def test_neighbours_meet_in_the_same_exchanges(num_micro_batches, pp_size):
    """NCCL runs what two ranks tell each other in order, so the transfers of a pair must come in one order on both.

    Between two pieces of work a stage sends what the first made and receives what the second needs, in one batch.
    """
    for rank in range(pp_size - 1):
        here = _batches(run(num_micro_batches, rank, pp_size), sends="F", receives="B")
        there = _batches(run(num_micro_batches, rank + 1, pp_size), sends="B", receives="F")
        while here and there:
            # each side may only wait for what the other has in its first batch not yet met
            mine, theirs = here[0], there[0]
            met = mine & theirs
            assert met, f"stage {rank} waits for {mine}, its neighbour for {theirs}"
            here[0], there[0] = mine - met, theirs - met
            here, there = here if here[0] else here[1:], there if there[0] else there[1:]
        assert not here and not there


def _batches(calls: list[tuple], sends: str, receives: str) -> list[set]:
    """The transfers of one side of a pair as sets, one per exchange: ("F", i) down the pipeline, ("B", i) up."""
    out = []
    for before, after in zip([None, *calls], [*calls, None]):
        batch = {call for call, kind in ((before, sends), (after, receives)) if call and call[0] == kind}
        out += [batch] if batch else []
    return out


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 6))
def test_stages_never_wait_for_each_other_in_a_circle(num_micro_batches, pp_size):
    """Play all stages: a forward needs the stage before, a backward the stage behind. All must come to their end."""
    todo = [run(num_micro_batches, rank, pp_size) for rank in range(pp_size)]
    done: set[tuple] = set()
    moved = True
    while moved:
        moved = False
        for rank, calls in enumerate(todo):
            while calls and _ready(calls[0], rank, pp_size, done):
                kind, i = calls.pop(0)
                done.add((kind, rank, i))
                moved = True
    assert not any(todo)


def _ready(call: tuple, rank: int, pp_size: int, done: set[tuple]) -> bool:
    kind, i = call
    neighbour = rank - 1 if kind == "F" else rank + 1
    return not 0 <= neighbour < pp_size or (kind, neighbour, i) in done


def test_one_stage_is_plain_accumulation():
    assert run(2, 0, 1) == [("F", 0), ("B", 0), ("F", 1), ("B", 1)]
