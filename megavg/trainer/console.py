"""Say where a training is: a bar on a terminal, a plain line now and then in a log file or under Slurm."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, Mapping

_SHOWN = {"loss": "loss", "reward/mean": "reward", "iou/mean": "IoU", "entropy/mean": "entropy"}
_LEAST_SHARE = 0.005


def wants_bar() -> bool:
    """Whether a bar can be drawn: on a terminal, unless Slurm keeps its output in a file or it cannot move a cursor."""
    batch = {"SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE"} & os.environ.keys()  # mpirun gives its processes terminals too
    return sys.stdout.isatty() and not batch and os.environ.get("TERM") != "dumb"


def clock(seconds: float) -> str:
    """A duration as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def figures(values: Mapping[str, Any]) -> str:
    """Those figures of a step that one looks at first."""
    shown = [f"{name} {_format(values[key])}" for key, name in _SHOWN.items() if key in values]
    if "tokens_per_second" in values:
        shown.append(f"{values['tokens_per_second']:,.0f} tok/s")
    return "  ".join(shown)


def phases(values: Mapping[str, Any]) -> str:
    """How long a step took and the share of each phase, in their order: "4.2 s: rollout 62 % score 11 %"."""
    whole = values.get("time/step")
    if not whole:
        return ""
    shares = {name.removeprefix("time/"): seconds / whole for name, seconds in values.items()
              if name.startswith("time/") and name != "time/step"}
    rest = 1 - sum(shares.values())
    parts = [f"{name} {share * 100:.0f} %" for name, share in (shares | {"other": rest}).items()
             if share >= _LEAST_SHARE]
    return f"{whole:.1f} s: {' '.join(parts)}"


class Pace:
    """Estimates the time that is left from the steps of this process, with all that happened between them."""

    def __init__(self, num_steps: int):
        self._num_steps = num_steps
        self._first: tuple[int, float] | None = None

    def left(self, step: int, step_seconds: float) -> float:
        """Seconds from the end of ``step`` to the last; the first step, which is slow, counts for itself alone."""
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        first, then = self._first
        each = (now - then) / (step - first) if step > first else step_seconds
        return each * (self._num_steps - step)


class Console:
    """What one process prints.

    Args:
        num_steps, start_step: of the whole run, and where this process begins.
        log_every: steps between plain lines where there is no bar.
    """

    def __init__(self, num_steps: int, start_step: int, log_every: int):
        self._num_steps, self._start_step, self._log_every = num_steps, start_step, log_every
        self._pace = Pace(num_steps)
        self._bar: _Bar | None = None

    def start(self) -> None:
        """Draw the bar, where there can be one; :meth:`stop` must follow."""
        if wants_bar():
            self._bar = _Bar(self._num_steps, self._start_step)

    def say(self, text: str) -> None:
        """One line; above the bar, where there is one."""
        print(f"[megavg] {text}", flush=True)

    def progress(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the figures of a step; without a bar only every ``log_every`` steps, the first and the last."""
        left = clock(self._pace.left(step, values.get("time/step", 0.0)))
        if self._bar is not None:
            self._bar.show(step, figures(values), phases(values), left)
        elif step % self._log_every == 0 or step in (self._start_step + 1, self._num_steps):
            parts = (f"step {step}/{self._num_steps}", figures(values), phases(values),
                     f"{left} left" if step < self._num_steps else "")
            self.say("  ".join(filter(None, parts)))

    def stop(self) -> None:
        """Leave the terminal as it was, with the bar as it stands above what comes next; may be called twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Bar:
    """A bar with the time that passed and that is left, and under it the figures and phases of the last step."""

    def __init__(self, num_steps: int, start_step: int):
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("[megavg]", markup=False), BarColumn(None), MofNCompleteColumn(), TextColumn("steps"),
            TimeElapsedColumn(), TextColumn("{task.fields[left]}"), expand=True)
        self._task = self._progress.add_task("training", total=num_steps, completed=start_step, left="first step")
        self._live = Live(self._progress, refresh_per_second=2)
        self._live.start()
        self._live.console.show_cursor(True)  # a killed run leaves it as it is

    def show(self, step: int, figures_line: str, phases_line: str, left: str) -> None:
        from rich.console import Group
        from rich.text import Text

        self._progress.update(self._task, completed=step, left=f"{left} left")
        lines = [Text(f"  {line}", no_wrap=True, overflow="ellipsis") for line in (figures_line, phases_line) if line]
        self._live.update(Group(self._progress, *lines), refresh=True)

    def stop(self) -> None:
        self._live.stop()


def _format(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if 0 < abs(value) < 5e-4 else f"{value:.3f}"
