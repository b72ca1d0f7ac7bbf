"""The watchdogs' exchange over a connection that is cut: it makes another one while the store is there."""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from tools.forked_ranks import Job

PERIOD = 0.1


class Relay:
    """A network between the processes and the store, whose connections can be cut."""

    def __init__(self, port: int):
        self._target, self._open = port, []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Every connection that there is breaks, and new ones can be made."""
        for end in self._open:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:  # it is cut already
                pass

    def close(self) -> None:
        """Nothing is reached any more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._open += [near, far]
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
        except OSError:
            pass
        self.cut()


def within(seconds: float, condition) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(PERIOD / 2)
    return condition()


def cut_and_close() -> int:
    """What the exchange does when its connection breaks, and when the store is gone."""
    from megavg.parallel.watchdog_exchange import Exchange

    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(minutes=10), wait_for_workers=False)
    relay = Relay(store.port)
    far = dist.TCPStore("127.0.0.1", relay.port, None, False, timedelta(minutes=10))
    dist.init_process_group("gloo", store=far, rank=0, world_size=1)
    exchange = Exchange(0, 2, PERIOD)
    exchange.watching = True
    exchange.publish({"step": 1})
    exchange.start()
    assert within(5, lambda: exchange.fetched > exchange._begun)
    for _ in range(2):
        relay.cut()
        cut = time.monotonic()
        assert within(10, lambda: exchange.answered > cut + 2 * PERIOD), "a new connection is made"
    exchange.declare()
    assert within(5, lambda: exchange.hang), "as the store tells it, through the third connection"
    relay.close()
    time.sleep(10 * PERIOD)
    closed = time.monotonic()
    assert not within(1, lambda: exchange.answered > closed), "it knows that it hears nothing"
    exchange.leave(timeout=3)
    assert not exchange.is_alive(), "it does not hold up the end of the process"
    return 0


def test_a_cut_connection_is_made_again_and_a_lost_store_is_noticed(tmp_path: Path):
    with Job(tmp_path / "log", 1, cut_and_close) as job:
        assert job.wait(60) == [0], job.last_lines()
