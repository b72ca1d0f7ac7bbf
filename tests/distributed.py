"""Run a function on several real gloo ranks and bring back what each returned.

Each rank is a process of its own, forked from one server that has loaded the heavy libraries and nothing else (no
threads, no groups): a start takes a tenth of a second instead of the seven of the imports.
"""

from __future__ import annotations

import gc
import os
import pickle
import traceback
from typing import Any, Callable

import torch
import torch.multiprocessing as mp

from tools.forked_ranks import PRELOADED
from tools.local_ranks import free_port


def run_ranks(world_size: int, function: Callable, *args: Any, timeout: float = 240) -> list[Any]:
    """``function(*args)`` on ``world_size`` processes inside one gloo world; returns the results in rank order.

    ``function`` must be defined at the top of a test module. A rank that raises or hangs fails the test with its
    traceback, and all ranks are ended.
    """
    server = mp.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    results = server.SimpleQueue()
    port = free_port()
    ranks = [server.Process(target=_rank_main, daemon=True,
                            args=(rank, world_size, port, dict(os.environ), results, function, args))
             for rank in range(world_size)]
    for process in ranks:
        process.start()
    try:
        return _collect(ranks, results, timeout)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()


def _rank_main(rank: int, world_size: int, port: int, environment: dict, results, function: Callable,
               args: tuple) -> None:
    gc.freeze()  # a collection would copy all of the server's memory, only to find that it is in use
    os.environ.clear()  # the server's is that of the first call
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    try:
        from megavg.parallel.mcore import start_processes

        start_processes(timeout_minutes=3)
        answer = (rank, function(*args), None)
    except BaseException:  # the parent shows it
        answer = (rank, None, traceback.format_exc())
    # as bytes: a tensor in shared memory would be gone with this process
    results.put(pickle.dumps(answer))


def _collect(ranks, results, timeout: float) -> list[Any]:
    import time

    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(found) < len(ranks):
        if not results.empty():
            rank, value, error = pickle.loads(results.get())
            if error:
                raise AssertionError(f"rank {rank} of {len(ranks)}:\n{error}")
            found[rank] = value
        elif time.monotonic() > deadline:
            raise AssertionError(f"ranks {sorted(set(range(len(ranks))) - set(found))} of {len(ranks)} did not answer "
                                 f"in {timeout:.0f} s")
        elif any(p.exitcode not in (None, 0) and r not in found for r, p in enumerate(ranks)) and results.empty():
            raise AssertionError(f"a rank died: exit codes {[p.exitcode for p in ranks]}")
        else:
            time.sleep(0.05)
    return [found[rank] for rank in range(len(ranks))]
