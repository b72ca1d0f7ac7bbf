"""The order of 1F1B: every micro-batch once, in order, forward first, with few activations held."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megavg.parallel.schedule import one_forward_one_backward

sizes = st.integers(1, 8).flatmap(lambda pp: st.tuples(st.integers(1, 20), st.integers(0, pp - 1), st.just(pp)))


def run(num_micro_batches: int, pp_rank: int, pp_size: int) -> list[tuple]:
    """The calls of one stage: ("F", i) and ("B", i, is_last)."""
    calls: list[tuple] = []

    def forward(i):
        calls.append(("F", i))
        return f"activations of {i}"

    def backward(passed, is_last):
        calls.append(("B", int(passed.removeprefix("activations of ")), is_last))

    one_forward_one_backward(num_micro_batches, pp_rank, pp_size, forward, backward)
    return calls


@settings(deadline=None)
@given(sizes)
def test_every_micro_batch_once_and_in_order(size):
    calls = run(*size)
    for kind in "FB":
        assert [call[1] for call in calls if call[0] == kind] == list(range(size[0]))
    for i in range(size[0]):
        assert calls.index(("F", i)) < calls.index(("B", i, i == size[0] - 1))


@settings(deadline=None)
@given(sizes)
def test_only_the_last_backward_is_told_so(size):
    assert [call[2] for call in run(*size) if call[0] == "B"] == [False] * (size[0] - 1) + [True]


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
                kind, i, *_ = calls.pop(0)
                done.add((kind, rank, i))
                moved = True
    assert not any(todo)


def _ready(call: tuple, rank: int, pp_size: int, done: set[tuple]) -> bool:
    kind, i, *_ = call
    neighbour = rank - 1 if kind == "F" else rank + 1
    return not 0 <= neighbour < pp_size or (kind, neighbour, i) in done


def test_one_stage_is_plain_accumulation():
    assert run(2, 0, 1) == [("F", 0), ("B", 0, False), ("F", 1), ("B", 1, True)]
