"""What the ranks' watchdogs tell each other, through the store at which the processes have met.

The store answers while collectives hang. It lives in one process, mostly rank 0's; when that one is gone, the exchange
is silent. All calls are made from a thread of their own, as a store whose process is stopped never returns from one.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from itertools import count

import torch.distributed as dist

_runs = count()  # a process may go through several runs in one world; all ranks count alike


class Exchange(threading.Thread):
    """Publishes this rank's heartbeat every ``period`` seconds, and fetches the others' while ``watching`` is set.

    Attributes:
        beats: rank -> its last heartbeat, as far as fetched.
        hang: a rank has found a hang.
        reports: rank -> what it has reported of the hang.
        answered: time.monotonic() when the store last answered.
        fetched: likewise, with the others' heartbeats.
    """

    def __init__(self, rank: int, world_size: int, period: float):
        super().__init__(daemon=True, name="watchdog's exchange")
        self.rank, self.world_size, self._period = rank, world_size, period
        self._place = f"watchdog/{next(_runs)}"
        self._store = self._connect()
        self._mine, self._report, self._declared = "", "", False
        self._wake, self._leaving = threading.Event(), False
        self._claiming, self._asked, self._first = False, threading.Event(), False
        self.watching = self.hang = False
        self.beats: dict[int, dict] = {}
        self.reports: dict[int, str] = {}
        self._changed: dict[int, float] = {}
        self.answered = self.fetched = self._begun = time.monotonic()

    def publish(self, beat: dict) -> None:
        """Give the next heartbeat, which is never equal to the one before."""
        self._mine = json.dumps({**beat, "at": time.time()})

    def declare(self) -> None:
        """Tell all ranks that there is a hang."""
        self._declared = self.watching = True
        self._wake.set()

    def report(self, text: str) -> None:
        """Tell all ranks what this one was doing."""
        self._report = text
        self._wake.set()

    def claim(self, timeout: float) -> bool:
        """Whether this rank is the first to ask; False too if the store does not answer in ``timeout`` seconds."""
        self._claiming = True
        self._wake.set()
        return self._asked.wait(timeout) and self._first

    def leave(self, timeout: float) -> None:
        """Publish the last heartbeat and end; a store that does not answer is left after ``timeout`` seconds."""
        self._leaving = True
        self._wake.set()
        self.join(timeout)

    def silence(self, rank: int) -> float:
        """Seconds since the last heartbeat of another rank."""
        seen = time.monotonic() - self._changed.get(rank, self._begun)
        # others are watched only while this rank waits; their own clock tells of the time before
        return max(seen, time.time() - self.beats[rank]["at"]) if rank in self.beats else seen

    def watched(self, rank: int) -> float:
        """Seconds that this rank has looked at another one without seeing a new heartbeat."""
        return self.fetched - self._changed.get(rank, self._begun)

    def run(self) -> None:
        while True:
            leaving = self._leaving
            try:
                self._turn()
            except dist.DistNetworkError:  # a broken connection stays broken
                self._connect_again()
            except RuntimeError:  # it is slow
                pass
            if leaving:
                return
            self._wake.wait(min(self._period, 0.2) if self.hang else self._period)
            self._wake.clear()

    def _connect(self) -> dist.PrefixStore:
        """A connection of its own: calls on one that others use would wait for theirs."""
        return dist.PrefixStore(self._place, dist.distributed_c10d._get_default_store().clone())

    def _connect_again(self) -> None:
        """Make a connection in the place of a broken one, if the store is still there; ``answered`` tells the others.

        A process that is gone refuses at once, while torch would try, and print, until the groups' time-out is over.
        """
        store = dist.distributed_c10d._get_default_store()
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        try:
            if isinstance(store, dist.TCPStore):
                socket.create_connection((store.host, store.port), timeout=max(1.0, self._period)).close()
            self._store = self._connect()
        except (OSError, RuntimeError):  # again in the next turn
            pass

    def _turn(self) -> None:
        if self._mine:
            self._store.set(f"beat/{self.rank}", self._mine)
        if self._declared:
            self._store.set("hang", "1")
        if self._report:
            self._store.set(f"report/{self.rank}", self._report)
        if self._claiming and not self._asked.is_set():
            self._first = self._store.add("told", 1) == 1
            self._asked.set()
        self.hang = self._store.check(["hang"])
        self.answered = time.monotonic()
        if self.watching:
            for rank, text in self._fetch("beat").items():
                beat = json.loads(text)
                if self.beats.get(rank, {}).get("at") != beat["at"]:
                    self.beats[rank], self._changed[rank] = beat, time.monotonic()
            if self.hang:
                self.reports = self._fetch("report")
            self.fetched = time.monotonic()

    def _fetch(self, kind: str) -> dict[int, str]:
        keys = {rank: f"{kind}/{rank}" for rank in range(self.world_size) if rank != self.rank}
        if not self._store.check(list(keys.values())):
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        values = self._store.multi_get(list(keys.values())) if keys else []
        return {rank: value.decode() for rank, value in zip(keys, values)}
