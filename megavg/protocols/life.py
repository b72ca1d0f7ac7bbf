"""Signs of life: work that takes long in one line of code tells that it goes on, to whoever watches this process.

Rooms that read and write know nothing of the watchdog, which cannot tell a loop over slow reads from one read that
never ends.
"""

from __future__ import annotations

from typing import Callable

_watchers: list[Callable[[], None]] = []


def goes_on() -> None:
    """Say that work goes on, after every piece of it; from any thread."""
    for watcher in tuple(_watchers):
        watcher()


def watch(watcher: Callable[[], None]) -> Callable[[], None]:
    """Have ``watcher`` called at every sign of life; returns what ends that, harmless when called again."""
    _watchers.append(watcher)

    def end() -> None:
        if watcher in _watchers:
            _watchers.remove(watcher)

    return end
