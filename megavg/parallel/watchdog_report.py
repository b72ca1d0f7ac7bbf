"""The diagnosis of a hang, from what every rank was doing and which of them are gone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Sequence

from megavg.parallel.watchdog_rank import RankState, Wait


@dataclass(frozen=True)
class Missing:
    """A rank that does not answer any more.

    Attributes:
        why: such as "is gone: no heartbeat since 20 s".
        last: where it was when it was last heard of, such as "in step 12 (update)"; may be empty.
        places: where its interpreter is stuck, if that is known.
    """

    why: str
    last: str = ""
    places: list[str] = field(default_factory=list)


def name_ranks(ranks: Sequence[int]) -> str:
    """"rank 3", or "ranks 0, 1, 2"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def at(step: int, phase: str) -> str:
    """Where in the run: "in step 12 (update)", or "in the start" before the first step."""
    return f"in step {step} ({phase})" if step else f"in the {phase}"


def diagnose(states: dict[int, RankState], missing: dict[int, Missing]) -> list[str]:
    """One line for each rank that others wait for: it, what it has not entered, who waits in that, and where it is.

    Args:
        states: of the ranks that answer.
        missing: the others.
    """
    idle = [rank for rank, state in states.items() if state.waits is None]
    culprits = sorted({*missing, *idle} or {rank for state in states.values() for rank in _absent(state, states)})
    if not culprits:
        return [_stuck_together(states)]
    return [_line(rank, states, missing) for rank in culprits]


def _absent(state: RankState, states: dict[int, RankState]) -> list[int]:
    """The ranks that have not entered what this one waits in."""
    wait = state.waits
    if wait is None:
        return []
    return [rank for rank in wait.ranks if rank != state.rank and not _has_entered(states.get(rank), wait)]


def _has_entered(state: RankState | None, wait: Wait) -> bool:
    if state is None:
        return False
    if wait.number:
        return state.begun.get(wait.group, 0) >= wait.number
    return state.waits is not None and (state.waits.group, state.waits.op) == (wait.group, wait.op)


def _line(rank: int, states: dict[int, RankState], missing: dict[int, Missing]) -> str:
    state, gone = states.get(rank), missing.get(rank)
    waiting = [other for other, found in sorted(states.items()) if rank in _absent(found, states)]
    parts = [f"rank {rank} {gone.why}"] if gone else []
    if waiting:
        first = states[waiting[0]]
        same = [other for other in waiting
                if (states[other].waits.group, states[other].waits.op) == (first.waits.group, first.waits.op)]
        wait = "waits" if len(same) == 1 else "wait"
        parts.append(f"rank {rank} has not entered {first.waits} {at(first.step, first.phase)}, that "
                     f"{name_ranks(same)} {wait} in since {min(states[other].idle for other in same):.0f} s")
    elif state:
        parts.append(f"rank {rank} has not moved for {state.idle:.0f} s")
        others = [found for found in states.values() if found.waits is not None and found.rank != rank]
        parts += [f"rank {found.rank} waits in {found.waits}" for found in others]
    if state:
        parts.append(f"rank {rank}, {at(state.step, state.phase)}, is in {', called by '.join(state.places)}"
                     + (f", waiting in {state.waits}" if state.waits else ""))
    elif gone:
        parts += [f"it was last heard of {gone.last}"] if gone.last else []
        parts += [f"it is stuck in {', called by '.join(gone.places)}"] if gone.places else []
    return "; ".join(parts)


def _stuck_together(states: dict[int, RankState]) -> str:
    """All have entered what they wait in, or wait for each other in different things."""
    by_wait: dict[str, list[int]] = {}
    for rank, state in states.items():
        by_wait.setdefault(f"{state.waits} {at(state.step, state.phase)}", []).append(rank)
    idle = min(state.idle for state in states.values())
    what = "; ".join(f"{name_ranks(ranks)} in {wait}" for wait, ranks in by_wait.items())
    why = ("all have entered it, so a device or the network does not do its work" if len(by_wait) == 1 else
           "they wait for each other in different collectives")
    return f"every rank waits since {idle:.0f} s, {what}; {why}"
