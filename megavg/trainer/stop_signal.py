"""SIGTERM and SIGUSR1 as Slurm sends them: finish the step, save, leave."""

from __future__ import annotations

import signal
import threading

from megavg.parallel.context import ParallelContext

MARKER = "stopped.json"
"""File in a run's folder that says that it was asked to leave, and where to go on."""
EXIT_STATUS = 75
"""EX_TEMPFAIL of sysexits.h: not done, try again."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Remembers that this process was asked to leave. Use it as a context manager, on every rank."""

    def __init__(self, context: ParallelContext):
        self._context, self._received, self._before = context, 0, {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        self._received = self._received or number

    def agreed(self) -> str | None:
        """The name of the signal that some rank has received, on all ranks alike; None so far. A small collective."""
        number = self._context.max_over_world(self._received)
        return signal.Signals(number).name if number else None
