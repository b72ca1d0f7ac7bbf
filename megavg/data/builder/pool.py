"""Run independent jobs in this process or in several, with a count of what is done while they run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, Iterator, Sequence

_POLL_SECONDS = 0.25
_counter: Any = None


def run_jobs(work: Callable[..., Any], jobs: Sequence[Any], num_processes: int,
             progress: Callable[[int], None] = lambda done: None) -> Iterator[Any]:
    """Yield ``work(job, tick)`` for every job, as they are finished; ``tick(n)`` adds n to the count of the done.

    With several processes, ``work`` and the jobs must pickle, and a script has to call this below
    ``if __name__ == "__main__":``, as the processes are started afresh and not forked: they hold none of the parent's
    locks and threads, and can be started beside MPI. They end when their parent is gone, however it went.

    Args:
        progress: called now and then with the count.

    Raises:
        ChildProcessError: a process was killed.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes={num_processes}: expected at least 1")
    if num_processes == 1 or len(jobs) < 2:
        yield from _run_here(work, jobs, progress)
    else:
        yield from _run_apart(work, jobs, min(num_processes, len(jobs)), progress)


def _run_here(work, jobs, progress) -> Iterator[Any]:
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress(done)

    for job in jobs:
        yield work(job, tick)


def _run_apart(work, jobs, num_processes, progress) -> Iterator[Any]:
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(num_processes, context, _begin, (counter,))
    try:
        # The parent alone answers Ctrl-C: a process starts with the signal blocked, from its first instruction on.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            waiting = {pool.submit(_run_one, work, job) for job in jobs}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while waiting:
            finished, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
            progress(counter.value)
            for future in finished:
                yield future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError("a building process was killed, perhaps for want of memory; the finished shards are "
                                "kept, run the same command again, with fewer processes") from error
    finally:
        # Waits for the shards that are being built, which the next run then finds finished.
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(counter) -> None:
    """Start of a process: its parent's end, even by SIGKILL, is its end."""
    global _counter
    _counter = counter
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_one(work, job) -> Any:
    return work(job, _tick)


def _tick(count: int) -> None:
    with _counter.get_lock():
        _counter.value += count
