"""What one process is doing, seen from another of its threads: where it is, what it waits in, how far it has come."""

from __future__ import annotations

import dataclasses
import json
import linecache
import os
import re
import socket
import sys
import sysconfig
import threading
import traceback
from dataclasses import dataclass, field
from types import FrameType
from typing import Callable, Iterable, Iterator

import torch
import torch.distributed as dist

_C10D = "torch.distributed.distributed_c10d"
_WRAPPERS = "torch.distributed.c10d_logger"
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


@dataclass(frozen=True)
class Wait:
    """A collective or transfer that a rank has begun and that has not ended.

    Attributes:
        op: such as all_reduce.
        group, label: name of the process group, the same on all its ranks, and what it is called where it was made.
        ranks: all that take part; none where that is not known.
        shape: of its first tensor, such as [517, 2]; empty where there is none.
        number: how many collectives the group had begun then, with this one; 0 where that is not known.
    """

    op: str
    group: str = ""
    label: str = ""
    ranks: list[int] = field(default_factory=list)
    shape: str = ""
    number: int = 0

    def __str__(self) -> str:
        about = [self.label] if self.label else []
        about += [f"ranks {', '.join(map(str, self.ranks))}"] if self.ranks else []
        about += [f"collective {self.number} of this group"] if self.number else []
        return f"{self.op}{self.shape and ' of ' + self.shape}" + (f" ({'; '.join(about)})" if about else "")


@dataclass(frozen=True)
class RankState:
    """One rank at one moment.

    Attributes:
        idle: seconds since it moved.
        waits: what it waits in, if that is another rank.
        begun: group -> number of the last collective that it has begun there, as far as torch's recorder goes back.
        places: its main thread's innermost line and, where that is in a library, the innermost line of other code.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    idle: float
    waits: Wait | None
    begun: dict[str, int]
    places: list[str]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> "RankState":
        values = json.loads(text)
        return RankState(**{**values, "waits": values["waits"] and Wait(**values["waits"])})


def position() -> tuple:
    """Where the main thread is and how many collectives have begun: another value than before if the rank has moved."""
    frame, places = _main_frame(), []
    while frame is not None:
        places.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return _collectives_begun(), tuple(places)


def look(rank: int, step: int, phase: str, idle: float) -> RankState:
    """What this process is doing now."""
    frame, recorded = _main_frame(), _recorded()
    begun: dict[str, int] = {}
    for entry in recorded:
        if not entry.get("is_p2p"):
            name = entry["process_group"][0]
            begun[name] = max(begun.get(name, 0), entry["collective_seq_id"])
    open_ones = [entry for entry in recorded if not entry.get("retired", True)]
    waits = _wait_of(open_ones[0]) if open_ones else _wait_on_stack(frame, rank)
    return RankState(rank, socket.gethostname(), os.getpid(), step, phase, round(idle, 1), waits, begun,
                     choose_places(_calls(frame)))


def stacks() -> str:
    """The Python stacks of all threads, the main one first, innermost call last."""
    main, frames = threading.main_thread(), sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident in sorted(frames, key=lambda ident: ident != main.ident):
        parts.append(f"thread {names.get(ident, 'unknown')} ({ident:#x}), innermost call last:\n"
                     + "".join(traceback.format_stack(frames[ident])))
    return "\n".join(parts)


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident)


def _groups() -> dict[str, dist.ProcessGroup]:
    if not dist.is_initialized():
        return {}
    return {name: group for group, name in list(dist.distributed_c10d._world.pg_names.items())}


def _collectives_begun() -> int:
    total = 0
    for group in _groups().values():
        try:
            total += group._get_sequence_number_for_group()
        except RuntimeError:  # it is being given up at this moment
            pass
    return total


def _recorded() -> list[dict]:
    """The last collectives in the order of their begin, from torch's flight recorders, which run unasked.

    NCCL has one of its own beside that of the other backends. It asks the device how far it is, which may never answer
    on one that hangs.
    """
    found: list[dict] = []
    asked = []
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None and dist.is_initialized():
            asked.append(threading.Thread(target=lambda dump=dump: found.extend(_entries(dump)), daemon=True,
                                          name="flight recorder"))
            asked[-1].start()
    for thread in asked:
        thread.join(timeout=4)
    return sorted(found, key=lambda entry: (entry.get("time_created_ns", 0), entry["record_id"]))


def _entries(dump: Callable[[bool, bool], bytes]) -> list[dict]:
    return json.loads(dump(True, False)).get("entries", [])


def _wait_of(entry: dict) -> Wait:
    """An entry of torch's flight recorder."""
    name, label = entry["process_group"]
    sizes = entry.get("input_sizes") or entry.get("output_sizes") or [[]]
    op = entry["profiling_name"].split(":", 1)[-1].removeprefix("_")
    return Wait(op, name, label, _ranks(_groups().get(name)), str(sizes[0]) if sizes[0] else "",
                0 if entry.get("is_p2p") else entry["collective_seq_id"])


def _wait_on_stack(frame: FrameType | None, rank: int) -> Wait | None:
    """What the recorder does not know: transfers between two ranks, the making of groups."""
    innermost, found = frame, None
    while frame is not None and frame.f_globals.get("__name__") in (_C10D, _WRAPPERS):
        if frame.f_globals["__name__"] == _C10D and not frame.f_code.co_name.startswith("_"):
            found = frame
        frame = frame.f_back
    if found is None:
        line = _source(innermost) if innermost is not None else ""
        return Wait(f"what `{line}` waits for") if re.search(r"\b(wait|synchronize)\(\)", line) else None
    local = found.f_locals
    group = local.get("group") if isinstance(local.get("group"), dist.ProcessGroup) else dist.group.WORLD
    peer = next((local[name] for name in ("src", "dst") if isinstance(local.get(name), int)), None)
    transfer = found.f_code.co_name in ("send", "recv") and peer is not None
    tensors = [value for value in local.values() if isinstance(value, torch.Tensor)]
    return Wait(found.f_code.co_name, dist.distributed_c10d._world.pg_names.get(group, ""),
                getattr(group, "group_desc", ""), sorted([rank, peer]) if transfer else _ranks(group),
                str(list(tensors[0].shape)) if tensors else "")


def _ranks(group: dist.ProcessGroup | None) -> list[int]:
    return dist.get_process_group_ranks(group) if group is not None else []


def choose_places(calls: Iterable[tuple[str, int, str]]) -> list[str]:
    """Of (file, line, function), innermost first: the innermost, and the innermost outside of libraries, as text."""
    places = []
    for name, line, function in calls:
        own = not name.startswith((*_LIBRARIES, "<frozen"))
        if own or not places:
            places.append(f"`{linecache.getline(name, line).strip()}` at {name}:{line} ({function})")
        if own:
            break
    return places


def _calls(frame: FrameType | None) -> Iterator[tuple[str, int, str]]:
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname
        frame = frame.f_back


def _source(frame: FrameType) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
