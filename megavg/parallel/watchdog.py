"""Finds a hang, says which rank the others wait for and where it is, and ends the job so that it can start again."""

from __future__ import annotations

import faulthandler
import os
import re
import threading
import time
import traceback
import weakref
from pathlib import Path
from typing import Callable

import torch.distributed as dist

from megavg.parallel import watchdog_rank
from megavg.parallel.watchdog_exchange import Exchange
from megavg.parallel.watchdog_rank import RankState
from megavg.parallel.watchdog_report import Missing, at, diagnose
from megavg.protocols.life import watch

HANG_STATUS = 76
"""Exit status of every rank of a job that hung: not done, start it again."""

_START = "start"
_START_FACTOR = 2  # a large model is read from a slow disk in one call
_RECORD = "record: "
_LOST = "has lost another rank"


class Watchdog:
    """One rank's watchdog. ``start`` it before what may hang, then use it as a context manager, on every rank.

    A rank moves when it begins a phase (:meth:`beat`) or a collective, when it gives a sign of life
    (``megavg.protocols.life``), or when its main thread is at another place than at the last look, some twenty times in
    ``timeout_s``. There is a hang when no rank has moved for ``timeout_s`` (twice that before the first beat): a rank
    that waits for a slow one is not taken for a hang. Then each rank writes what it was doing with the stacks of all
    its threads to ``folder``/rank-00003.txt, the lowest one prints one diagnosis, and every process ends with
    ``HANG_STATUS``.

    A rank that does not answer for ``gone_after`` seconds is told as gone: killed, stopped, or kept from running by a
    call that never gives the interpreter free. Stacks of the latter are in ``folder``/rank-00003.frozen.

    Args:
        folder: which all machines share.
        timeout_s: seconds; longer than any single call that may take long. 0 makes all of this do nothing.
    """

    def __init__(self, folder: str | Path, timeout_s: float):
        self.folder, self.timeout_s = Path(folder), timeout_s
        self.period = min(5.0, timeout_s / 20)
        self.gone_after = max(2.0, 5 * self.period)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._mark, self._beats, self._signs, self._left = (0, _START), 0, 0, ""
        self._position, self._moved = None, time.monotonic()
        self._looked = self._moved
        self._exchange: Exchange | None = None
        self._frozen = None
        self._thread: threading.Thread | None = None
        self._deaf: Callable[[], None] = lambda: None
        self._stopped = threading.Event()

    def start(self) -> "Watchdog":
        """Begin to watch; the main thread calls it."""
        if self.timeout_s:
            self._deaf = _listen(weakref.ref(self))
            if self.world_size > 1:
                self._exchange = Exchange(self.rank, self.world_size, self.period)
                self._publish(stuck=False)
                self._exchange.start()
                weakref.finalize(self, self._exchange.leave, 0)  # a run that is refused before it begins
            self._thread = threading.Thread(target=_watch, args=(weakref.ref(self), self._stopped, self.period),
                                            daemon=True, name="watchdog")
            self._thread.start()
        return self

    def beat(self, step: int, phase: str) -> None:
        """Say that ``phase`` of ``step`` (counted from 1) begins."""
        self._mark, self._beats = (step, phase), self._beats + 1

    def moves(self) -> None:
        """Take a sign of life (``megavg.protocols.life``), where no other place of the main thread can be seen."""
        self._signs += 1

    def stop(self) -> None:
        """Watch no more. The others are told, and will not wait for this rank."""
        self._left = self._left or "has left"
        self._look_no_more()
        if self._exchange is not None and self._exchange.is_alive():
            self._publish(stuck=False)
            self._exchange.leave(timeout=2)

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None and self.timeout_s:
            lost = self._exchange is not None and _is_loss(error)
            self._left = f"{_LOST if lost else 'has left'}: {_first_line(error)}"
            if lost:
                self._look_no_more()
                self._tell_loss(error)
        self.stop()

    # what the watching thread does

    def _tick(self) -> None:
        now, position = time.monotonic(), (self._beats, self._signs, watchdog_rank.position())
        paused = now - self._looked > max(1.0, 3 * self.period)  # the whole process was stopped, its clock was not
        if position != self._position or paused:
            self._position, self._moved = position, now
        self._looked = now
        try:
            self._guard_interpreter()
        except OSError:  # a full disk must not end the watch
            pass
        idle = now - self._moved
        stuck = idle >= self.timeout_s * (1 if self._beats else _START_FACTOR)
        if self._exchange is not None:
            self._publish(stuck)
            self._exchange.watching = idle >= self.timeout_s / 2
        if self._exchange is not None and self._exchange.hang or stuck and self._nobody_moves():
            self._end()

    def _publish(self, stuck: bool) -> None:
        step, phase = self._mark
        self._exchange.publish({"step": step, "phase": phase, "stuck": stuck, "left": self._left,
                                "thread": threading.main_thread().ident})

    def _nobody_moves(self) -> bool:
        exchange = self._exchange
        if exchange is None or self._store_is_gone():
            return True
        if self._looked - exchange.fetched > self.gone_after:
            return False  # nothing is known of the others yet
        for rank in range(self.world_size):
            beat = exchange.beats.get(rank, {"stuck": False, "left": ""})
            silent = exchange.watched(rank) > self.gone_after
            if rank != self.rank and not (beat["stuck"] or beat["left"] or silent):
                return False
        return True

    def _store_is_gone(self) -> bool:
        return time.monotonic() - self._exchange.answered > self.gone_after

    def _missing(self) -> dict[int, Missing]:
        """The ranks that have left or are gone, as far as this one knows."""
        exchange, missing = self._exchange, {}
        if exchange is None:
            return {}
        if self._store_is_gone() and self.rank:
            silence = time.monotonic() - exchange.answered
            missing[0] = Missing(f"is gone: its store has not answered for {silence:.0f} s (killed, stopped or frozen)")
        for rank in set(range(self.world_size)) - {self.rank, *missing}:
            beat = exchange.beats.get(rank)
            last = at(beat["step"], beat["phase"]) if beat else ""
            if beat and beat["left"]:
                missing[rank] = Missing(beat["left"], last)
            elif exchange.watched(rank) > self.gone_after:
                places = _frozen_places(self.folder / _frozen_name(rank), beat["thread"]) if beat else []
                missing[rank] = Missing(f"is gone: no heartbeat since {exchange.silence(rank):.0f} s (killed, stopped "
                                        "or frozen)", last, places)
        return missing

    def _end(self) -> None:
        """Write down what this rank does, tell the diagnosis on one rank, end the process."""
        try:
            state = watchdog_rank.look(self.rank, *self._mark, time.monotonic() - self._moved)
            self._write(state)
            if self._exchange is not None:
                self._exchange.declare()
                self._exchange.report(state.to_json())
            states, missing = self._gather(state)
            if self._exchange is not None:
                self._exchange.leave(timeout=1)  # the store may end with the first rank that ends
            if min(states) == self.rank:
                time.sleep(1)  # until the others are through too: what they print of a lost store would come after
                self._say("hang", diagnose(states, missing), f"the stacks of all threads are in {self.folder}", True)
            else:
                time.sleep(3)  # whoever starts the ranks may end all of them when the first one ends
        except Exception:  # the job ends all the same
            traceback.print_exc()
        finally:
            os._exit(HANG_STATUS)

    def _write(self, state: RankState) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _file_name(self.rank)
        partial = path.with_name(path.name + ".tmp")
        partial.write_text(
            f"rank {state.rank} on {state.host}, process {state.pid}, {at(state.step, state.phase)}, has not moved for "
            f"{state.idle:.0f} s\nwaits in: {state.waits or 'no collective'}\n\n{watchdog_rank.stacks()}\n"
            f"{_RECORD}{state.to_json()}\n")
        os.replace(partial, path)

    def _gather(self, mine: RankState) -> tuple[dict[int, RankState], dict[int, Missing]]:
        """What the ranks that answer were doing, and the others."""
        states, deadline = {self.rank: mine}, time.monotonic() + max(12.0, 3 * self.period)
        written = (self.folder / _file_name(self.rank)).stat().st_mtime
        while True:
            missing = self._missing()
            if self._exchange is not None:
                reports = dict(self._exchange.reports)
                states |= {rank: RankState.from_json(text) for rank, text in reports.items()}
                if self._store_is_gone():
                    states |= self._files(written)
            missing = {rank: why for rank, why in missing.items() if rank not in states}
            if len(states) + len(missing) == self.world_size or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        unknown = set(range(self.world_size)) - {*states, *missing}
        return states, missing | {rank: Missing("does not answer") for rank in unknown}

    def _files(self, written: float) -> dict[int, RankState]:
        """What the other ranks have written of this hang; for a store that is gone."""
        found = {}
        for rank in set(range(self.world_size)) - {self.rank}:
            path = self.folder / _file_name(rank)
            if path.exists() and abs(path.stat().st_mtime - written) < max(60.0, self.timeout_s):
                found[rank] = RankState.from_json(path.read_text().rsplit(_RECORD, 1)[1])
        return found

    def _say(self, what: str, lines: list[str], after: str, again: bool) -> None:
        if again:
            after += (f"; every rank ends with exit status {HANG_STATUS}, and the same command with "
                      "trainer.resume=auto goes on from the newest checkpoint")
        text = "\n".join(f"{what}: {line}" for line in [*lines, after])
        os.write(2, f"\n{text}\n".encode())  # the lock of sys.stderr may be held by what hangs

    def _tell_loss(self, error: BaseException) -> None:
        """A collective has failed because a rank is no more: say which, and end for a new start.

        Returns where none is found, or where one has left with an error of its own.
        """
        exchange, found = self._exchange, {}
        exchange.watching = True
        begin = time.monotonic()
        while not found and time.monotonic() - begin < 2 * self.gone_after + 1:
            self._publish(stuck=True)
            time.sleep(self.period)
            found = {rank: why for rank, why in self._missing().items() if not why.why.startswith(_LOST)}
        if not found:
            return
        again = not any(why.why.startswith("has left") for why in found.values())
        if self._store_is_gone():  # nobody knows who else has noticed
            tells = self.rank == min(set(range(self.world_size)) - {*found})
        else:
            tells = exchange.claim(timeout=self.gone_after)
        if tells:
            lines = [f"rank {rank} {why.why}" + (f"; it was last heard of {why.last}" if why.last else "")
                     for rank, why in sorted(found.items())]
            self._say("lost", lines, f"rank {self.rank} noticed {at(*self._mark)}: {_first_line(error)}", again)
        if again:
            os._exit(HANG_STATUS)

    # a call that never gives the interpreter free stops this thread too; faulthandler's own needs no interpreter

    def _guard_interpreter(self) -> None:
        if not self._beats:
            return  # the run's folder may yet be refused
        if self._frozen is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._frozen = open(self.folder / _frozen_name(self.rank), "wb+", buffering=0)
        if os.fstat(self._frozen.fileno()).st_size:  # it was only slow
            self._frozen.seek(0)
            self._frozen.truncate()
        faulthandler.dump_traceback_later(self.timeout_s / 2, file=self._frozen)

    def _look_no_more(self) -> None:
        self._deaf()
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        if self._frozen is not None:
            faulthandler.cancel_dump_traceback_later()
            self._frozen.close()
            self._frozen = None
            Path(self.folder, _frozen_name(self.rank)).unlink(missing_ok=True)
            try:
                self.folder.rmdir()
            except OSError:  # it holds the other ranks' files, or those of a hang
                pass


def _listen(watchdog: weakref.ref) -> Callable[[], None]:
    """Hear signs of life for a watchdog, as long as the run lives; returns what ends that."""
    def hear() -> None:
        alive = watchdog()
        if alive is not None:
            alive.moves()

    return watch(hear)


def _watch(watchdog: weakref.ref, stopped: threading.Event, period: float) -> None:
    """Look now and then, as long as the run lives."""
    while not stopped.wait(period):
        alive = watchdog()
        if alive is None:
            return
        try:
            alive._tick()
        except Exception:  # one bad look must not end the watch
            traceback.print_exc()
        del alive


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.txt"


def _frozen_name(rank: int) -> str:
    return f"rank-{rank:05d}.frozen"


def _frozen_places(path: Path, thread: int) -> list[str]:
    """Where a thread is in what faulthandler has written, if it has: as ``RankState.places``."""
    text = path.read_text(errors="replace") if path.exists() else ""
    for part in re.split(r"(?m)^(?=(?:Current thread|Thread) 0x)", text):
        ident = re.match(r"(?:Current thread|Thread) 0x([0-9a-f]+)", part)
        if ident and int(ident[1], 16) == thread:
            calls = re.findall(r'File "(.+)", line (\d+) in (.+)', part)
            return watchdog_rank.choose_places((name, int(line), function) for name, line, function in calls)
    return []


def _is_loss(error: BaseException) -> bool:
    """Whether a collective has failed because of another rank."""
    return isinstance(error, RuntimeError) and bool(
        re.search(r"gloo|nccl|connection (closed|reset|refused)|broken pipe", str(error), re.IGNORECASE))


def _first_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip().splitlines()[0][:300]
