"""Ranks of this machine that start at once: forked from a server that has loaded the libraries.

A rank that imports them itself takes seven seconds of a core for it. The server has neither threads nor process
groups, so each rank is as fresh as a new process.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Callable

from tools.local_ranks import free_port

PRELOADED = ["megavg.trainer.trainer", "megavg.trainer.evaluation_run",
             "transformers.models.qwen2_vl.modeling_qwen2_vl", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
             "transformers.models.qwen3_vl.modeling_qwen3_vl", "transformers.models.auto.processing_auto"]


class Job:
    """``function(*args)`` on ``world_size`` processes, each of which ends with the exit status that it returns.

    Use it as a context manager: what still runs at its end is killed.

    Args:
        log: what the ranks print is added to this file.
        function: defined at the top of a module; it joins the process group itself, as the launcher's environment
            describes it. An exception is printed and ends its rank with status 1.
    """

    def __init__(self, log: Path, world_size: int, function: Callable[..., int], *args: Any):
        self.log, server = Path(log), _server()
        environment = {**os.environ, "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu",
                       "OMP_NUM_THREADS": "1"}
        self.ranks = [server.Process(target=_rank_main, daemon=True, args=(
            rank, environment, str(log), function, args)) for rank in range(world_size)]
        for process in self.ranks:
            process.start()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error) -> None:
        self.kill()

    @property
    def exit_codes(self) -> list[int | None]:
        """Of each rank: its exit status, minus the signal that ended it, or None while it runs."""
        return [process.exitcode for process in self.ranks]

    @property
    def running(self) -> bool:
        """Whether some rank still runs."""
        return None in self.exit_codes

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to one rank."""
        os.kill(self.ranks[rank].pid, number)

    def kill(self) -> None:
        """SIGKILL to every rank that runs; returns when all are gone."""
        for process in self.ranks:
            if process.exitcode is None:
                try:
                    os.kill(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue  # it has just ended
        for process in self.ranks:
            process.join()

    def wait(self, timeout: float) -> list[int]:
        """The exit status of every rank, once all have ended.

        Raises:
            TimeoutError: after ``timeout`` seconds; with the last lines of the log.
        """
        deadline = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        if self.running:
            raise TimeoutError(f"ranks have not ended after {timeout:.0f} s (exit codes {self.exit_codes}):\n"
                               f"{self.last_lines()}")
        return self.exit_codes

    def last_lines(self, count: int = 25) -> str:
        """The end of what the ranks have printed."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-count:])


def _server():
    """The context of processes that are forked from the server, which starts with the first of them."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    before, root = dict(os.environ), str(Path(__file__).resolve().parents[1])
    # the server does not get this process' sys.path; killed ranks leave semaphores, which are cleared away unasked
    os.environ.update(PYTHONPATH=os.pathsep.join([root, *filter(None, [before.get("PYTHONPATH")])]),
                      DS_ACCELERATOR="cpu", PYTHONWARNINGS="ignore:resource_tracker:UserWarning,"
                                                           "ignore:Transformer Engine and Apex:UserWarning")
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return server


def _rank_main(rank: int, environment: dict[str, str], log: str, function: Callable[..., int], args: tuple) -> None:
    gc.freeze()  # a collection would copy all of the server's memory, only to find that it is in use
    os.environ.clear()  # the server's is that of the first job
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    torch.set_num_threads(1)
    try:
        code = function(*args)
    except BaseException:  # the reader of the log sees it
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # threads of engines and groups now and then abort a process whose work is done, as its interpreter ends
    os._exit(code)
