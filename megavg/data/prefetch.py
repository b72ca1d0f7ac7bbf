"""Decode records ahead of need in worker processes that start clean: nothing is forked, and they import no torch."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future

from megavg.data.decode import unpack
from megavg.data.sample import RawRecord, SampleError
from megavg.protocols.sample import Sample

_PIPE_BYTES = 1 << 20
_END_SECONDS = 5.0


class WorkerError(ValueError):
    """A worker process ended or failed in an unexpected way; its records cannot be had.

    It is a ``ValueError`` so that a run tells it to all its ranks and ends, as for other data that cannot be used.
    """


class _Worker:
    """One process, and the thread that takes its answers so that it never waits for the training step."""

    def __init__(self, number: int):
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        self.process = subprocess.Popen([sys.executable, "-m", "megavg.data.decode"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE,
                                        env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"})
        self.name = f"data worker {number} (process {self.process.pid})"
        self.waiting: dict[int, Future] = {}
        self._lock, self._closing, self._problem = threading.Lock(), False, ""
        _widen(self.process.stdin)
        _widen(self.process.stdout)
        self._thread = threading.Thread(target=self._listen, name=self.name, daemon=True)
        self._thread.start()

    def send(self, number: int, record: RawRecord, future: Future) -> None:
        with self._lock:
            if not self._problem:
                self.waiting[number] = future
        try:
            if not self._problem:
                pickle.dump((number, record), self.process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
                self.process.stdin.flush()
                return
        except OSError:  # it has ended; the listening thread finds out how
            self._thread.join(_END_SECONDS)
        if not future.done():
            future.set_exception(WorkerError(self._problem or f"{self.name} takes no more work"))

    def _listen(self) -> None:
        try:
            while True:
                number, answer = pickle.load(self.process.stdout)
                answer = unpack(answer)
                with self._lock:
                    future = self.waiting.pop(number)
                future.set_result(answer)
        except Exception as error:  # of any kind: a message cut in the middle is not always an EOFError
            how = self._how_it_ended(error)
        with self._lock:
            self._problem, waiting, self.waiting = how, self.waiting, {}
        for future in waiting.values():
            future.set_exception(WorkerError(how))

    def _how_it_ended(self, error: Exception) -> str:
        if self._closing:
            return f"{self.name} was closed"
        try:
            status = self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return f"{self.name} sent an answer that cannot be read ({type(error).__name__}: {error})"
        how = f"was ended by signal {-status}" if status < 0 else f"ended with exit status {status}"
        return (f"{self.name} {how}; where memory ran out, lower data.num_workers or data.prefetch_batches "
                "(data.num_workers=0 decodes in the training process)")

    def close(self) -> None:
        """End the process and wait for it; may be called twice."""
        self._closing = True
        try:
            self.process.stdin.close()
        except OSError:
            pass  # it had ended with work unsent
        try:
            self.process.wait(0.5)  # at its next look for work
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._thread.join(_END_SECONDS)
        if not self._thread.is_alive():
            self.process.stdout.close()


def _widen(pipe) -> None:
    """A pipe that holds a picture or two instead of 64 KiB, where the system has that."""
    try:
        import fcntl

        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except (ImportError, AttributeError, OSError):
        pass


def _close_all(workers: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:  # not in a fork of it
        for worker in workers:
            worker.close()
        workers.clear()


class DecodePool:
    """Worker processes that decode records; they end with ``close``, with this object and with this process.

    Attributes:
        pids: of the workers.
    """

    def __init__(self, num_workers: int):
        if num_workers < 1:
            raise ValueError(f"num_workers={num_workers}: expected at least 1")
        self._workers: list[_Worker] = []
        self.close = weakref.finalize(self, _close_all, self._workers, os.getpid())  # also at the interpreter's end
        self._workers += [_Worker(number) for number in range(num_workers)]
        self._numbers = itertools.count()

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def submit(self, record: RawRecord) -> Future:
        """Have ``record`` decoded; the answer is for ``result``."""
        future: Future = Future()
        worker = min(self._workers, key=lambda worker: len(worker.waiting))
        worker.send(next(self._numbers), record, future)
        return future


def result(future: Future, record: RawRecord) -> Sample | SampleError:
    """Wait for the sample of ``record``, or why there is none.

    Raises:
        WorkerError: the worker has ended, or failed in a way that is no fault of the record.
    """
    answer = future.result()
    if isinstance(answer, str):
        raise WorkerError(f"{record.shard}: sample {record.key!r}: the data worker failed:\n{answer}")
    return answer
