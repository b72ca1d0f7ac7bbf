"""What the tests ask a Slurm for; every wait has an end, and its failure shows the job's log."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Callable

ROOT = Path(__file__).resolve().parents[2]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


class Cluster:
    """A running Slurm, spoken to by its own commands in ``environment``."""

    def __init__(self, environment: dict[str, str]):
        self.environment = environment

    def call(self, *words: Any, **environment: str) -> subprocess.CompletedProcess:
        """Run one of Slurm's commands in the repository's folder."""
        return subprocess.run([str(word) for word in words], cwd=ROOT, env={**self.environment, **environment},
                              capture_output=True, text=True, timeout=60)

    def ask(self, *words: Any, **environment: str) -> str:
        """What a command that must succeed prints."""
        done = self.call(*words, **environment)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, folder: Path, *words: Any, **environment: str) -> str:
        """Submit a job that runs in ``folder`` and keeps its log there; returns its number."""
        return self.ask("sbatch", "--parsable", f"--chdir={folder}", *words, **environment)

    def about(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", "-o", job)))

    def log(self, job: str) -> str:
        """The log of a job, as far as it is written."""
        path = Path(self.about(job)["StdOut"])
        return path.read_text() if path.exists() else "(no log)"

    def wait(self, job: str, what: str, condition: Callable[[], Any], seconds: float = 600) -> Any:
        """The first true value of ``condition()`` while the job is in the queue."""
        deadline = time.monotonic() + seconds
        while True:
            state = self.about(job)["JobState"]
            found = condition()
            if found:
                return found
            assert state not in OVER, f"job {job} is {state} before {what}:\n{self.log(job)}"
            assert time.monotonic() < deadline, f"job {job} is {state}, not {what} in {seconds} s:\n{self.log(job)}"
            time.sleep(0.2)

    def finish(self, job: str, seconds: float = 600) -> tuple[str, int, str]:
        """Wait for a job's end; its state, exit status and log."""
        self.wait(job, "its end", lambda: self.about(job)["JobState"] in OVER, seconds)
        about = self.about(job)
        return about["JobState"], int(about["ExitCode"].split(":")[0]), self.log(job)

    def lose_node(self, node: str, job: str) -> None:
        """Let a node of a running job vanish with all that runs there: no process of it says anything any more.

        Slurm finds out by itself after SlurmdTimeout, minutes; the test tells it.
        """
        for process in _processes_of_node(node, job):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:  # it went with another one
                pass
        self.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def bring_back(self, node: str) -> None:
        """Start a lost node anew."""
        self.ask("slurmd", "-N", node)

    def start_again(self, job: str, restarts: int) -> None:
        """Wait until the job is back in the queue for the ``restarts``-th time, and spare it the two minutes there."""
        self.wait(job, "in the queue again", lambda: (
            self.about(job)["JobState"] == "PENDING" and self.about(job)["Restarts"] == str(restarts)))
        # one that starts in the second of its end is refused: "Job credential revoked"
        self.ask("scontrol", "update", f"JobId={job}", "StartTime=now+2")


def _processes_of_node(node: str, job: str) -> set[int]:
    """slurmd of a node, and what it started for a job: script, srun, ranks, and Slurm's own process above them."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = set((folder / "environ").read_bytes().split(b"\0"))
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            above = Path("/proc", parent, "cmdline").read_bytes()
        except OSError:  # it is gone
            continue
        if os.path.basename(words[0]) == b"slurmd" and words[1:3] == [b"-N", node.encode()]:
            found.add(int(folder.name))
        if {f"SLURM_JOB_ID={job}".encode(), f"SLURMD_NODENAME={node}".encode()} <= environment:
            found |= {int(folder.name)} | ({int(parent)} if b"slurmstepd" in above else set())
    return found


def rank_process(job: str, rank: int, program: str) -> int:
    """The process of a rank of a job that runs ``program``."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it is gone
            continue
        mine = {f"SLURM_JOB_ID={job}".encode(), f"RANK={rank}".encode()} <= set(environment)
        if mine and b"python" in os.path.basename(words[0]) and words[1].endswith(program.encode()):
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank} of job {job} runs {program}")
