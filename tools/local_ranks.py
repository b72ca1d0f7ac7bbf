"""Start a tool's own script on several ranks of this machine and collect what each of them found."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

PROGRESS = "| "
"""Lines that rank 0 prints with this in front are shown while it works."""


def run_local(num_processes: int, script: str, spec: Any, timeout: float = 3600) -> list[Any]:
    """Run ``script --worker FOLDER`` on ``num_processes`` ranks; returns each one's result, in the order of ranks.

    ``script`` passes FOLDER to ``answer``. When a rank fails or the time is over, all are ended and the last lines of
    the one that failed are the message of the exit.

    Args:
        spec: what the ranks are told; it crosses as JSON, and so do the results.
        timeout: seconds.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "spec.json").write_text(json.dumps(spec))
        ranks = _start(num_processes, script, folder)
        try:
            _wait(ranks, folder, time.monotonic() + timeout)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_processes)]


def answer(folder: str, function: Callable[[Any, Any], Any]) -> None:
    """Be one rank: join the others, call ``function(spec, device)``, leave its result for ``run_local`` and end."""
    from megavg.parallel.mcore import start_processes, stop_processes

    spec = json.loads(Path(folder, "spec.json").read_text())
    result = function(spec, start_processes(timeout_minutes=10))
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(result))
    stop_processes()
    sys.stdout.flush()
    # threads of engines and groups now and then abort a process whose work is done, as its interpreter ends
    os._exit(0)


def progress(text: str) -> None:
    """Show a line on the console of whoever started the ranks; only rank 0's are shown."""
    if os.environ.get("RANK") == "0":
        print(f"{PROGRESS}{text}", flush=True)


def _start(num_processes: int, script: str, folder: Path) -> list[subprocess.Popen]:
    environment = {**os.environ, "WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, os.path.abspath(script), "--worker", str(folder)]
    ranks = []
    for rank in range(num_processes):
        with open(folder / f"{rank}.log", "w") as log:
            ranks.append(subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                                          stdout=log, stderr=subprocess.STDOUT))
    return ranks


def _wait(ranks: list[subprocess.Popen], folder: Path, deadline: float) -> None:
    with open(folder / "0.log") as log:
        while any(process.poll() is None for process in ranks):
            _show(log)
            failed = [rank for rank, process in enumerate(ranks) if process.poll() not in (None, 0)]
            if failed:
                _give_up(f"rank {failed[0]} of {len(ranks)} ended with exit code {ranks[failed[0]].returncode}",
                         folder / f"{failed[0]}.log")
            if time.monotonic() > deadline:
                slow = next(rank for rank, process in enumerate(ranks) if process.poll() is None)
                _give_up(f"rank {slow} of {len(ranks)} did not finish in time", folder / f"{slow}.log")
            time.sleep(0.1)
        _show(log)
    failed = [rank for rank, process in enumerate(ranks) if process.returncode]
    if failed:
        _give_up(f"rank {failed[0]} of {len(ranks)} ended with exit code {ranks[failed[0]].returncode}",
                 folder / f"{failed[0]}.log")


def _show(log) -> None:
    for line in log:
        if line.startswith(PROGRESS):
            print(f"  {line[len(PROGRESS):].rstrip()}", file=sys.stderr, flush=True)


def _give_up(what: str, log: Path) -> None:
    lines = log.read_text().splitlines()[-25:]
    sys.exit(f"{what}; its last lines:\n" + "\n".join(lines))


def free_port() -> int:
    """A port that nothing listens on, below those that the system hands out by itself."""
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", random.randrange(15_000, 32_000)))
            except OSError:
                continue
            return probe.getsockname()[1]
