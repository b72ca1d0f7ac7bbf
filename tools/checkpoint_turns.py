"""One rank of ``tools/bench_checkpoint.py``: saves and loads in every way, with a clock and an eye on memory."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
import torch.distributed as dist

from megavg.checkpoint.sharded import write_parts
from megavg.checkpoint.train_state import Checkpoints, Snapshot
from megavg.parallel.context import ParallelContext
from tools.checkpoint_state import KINDS, State


def run_rank(rank: int, world_size: int, folder: str, width: int, num_layers: int, turns: int) -> None:
    """Measure ``turns`` turns; rank 0 leaves the figures in ``folder``."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    turner = Turner(State(width, num_layers, rank, world_size), Path(folder), rank, world_size)
    found = [turner.turn(number) for number in range(turns)]
    mine = sum(flat.nbytes for flat in turner.state.flat.values())
    shares: list = [None] * world_size
    dist.all_gather_object(shares, (mine, turner.equal, sorted({part.name for part in turner.state.parts})))
    if rank == 0:
        Path(folder, "figures.json").write_text(json.dumps({
            "turns": found, "bytes": sum(share[0] for share in shares), "bytes_of_rank": max(s[0] for s in shares),
            "equal": all(share[1] for share in shares), "tensors": len({name for share in shares for name in share[2]}),
            "width": width, "num_layers": num_layers, "parts_of_rank": len(turner.state.parts),
            "largest_tensor_bytes": turner.state.largest_tensor_bytes()}))
    dist.destroy_process_group()


class Turner:
    """Goes through all ways of saving and loading; all ranks together.

    Attributes:
        equal: whether every load so far brought back what was there.
    """

    def __init__(self, state: State, folder: Path, rank: int, world_size: int):
        self.state, self.folder, self.rank, self.world_size, self.equal = state, folder, rank, world_size, True
        world, cpu = dist.group.WORLD, torch.device("cpu")
        context = ParallelContext(world_size, rank, 1, 0, world, 1, 0, world, world_size, rank, world, cpu)
        self.runs = {name: Checkpoints(folder / name, context, in_background=name == "background")
                     for name in ("foreground", "background")}
        (folder / "model").mkdir(exist_ok=True)
        self.snapshot = Snapshot(1, {"layout": context.layout}, {}, "", folder / "model")

    def turn(self, number: int) -> dict[str, Any]:
        """Every row of the tables once; the order of the ways is turned around at every other turn."""
        rows: dict[str, Any] = {}
        ways = [self._checkpoints, self._background, self._parts, self._torch, self._safetensors, self._plain]
        for way in ways[::-1 if number % 2 else 1]:
            for name, row in way():
                rows[name] = row
                if self.rank == 0:
                    print(f"  {name}: {row['seconds']:.2f} s", file=sys.stderr, flush=True)
        return rows

    def _checkpoints(self) -> Iterator[tuple[str, dict]]:
        store, path = self.runs["foreground"], self.folder / "foreground" / "step-000001"

        def resume() -> None:
            store.check(path)
            store.read(path, self.state.parts)

        yield "save", self._measure(lambda: store.save(self.snapshot, self.state.parts))
        yield "read", self._load(path, lambda: store.read(path, self.state.parts))
        self._forget(path)
        yield "check", self._measure(lambda: store.check(path))
        yield "resume", self._load(path, resume)
        self._remove(self.folder / "foreground")

    def _background(self) -> Iterator[tuple[str, dict]]:
        store = self.runs["background"]
        held_up = self._measure(lambda: store.save(self.snapshot, self.state.parts))
        rest = self._measure(store.wait)
        yield "held_up", held_up
        # the copies are there before the wait begins
        yield "background", {key: held_up[key] + value for key, value in rest.items()}
        self._remove(self.folder / "background")

    def _parts(self) -> Iterator[tuple[str, dict]]:
        group = dist.group.WORLD if self.world_size > 1 else None
        yield "write_parts", self._measure(lambda: write_parts(self.folder / "parts", self.state.parts, group))
        self._remove(self.folder / "parts")

    def _torch(self) -> Iterator[tuple[str, dict]]:
        path = self._own("torch")

        def save() -> None:
            with path.open("wb") as file:
                torch.save(self.state.tensors(), file)
                file.flush()
                os.fsync(file.fileno())

        yield "torch_save", self._measure(save)
        yield "torch_load", self._load(path.parent, lambda: self._copy_in(torch.load(path, weights_only=True)))
        self._remove(path.parent)

    def _safetensors(self) -> Iterator[tuple[str, dict]]:
        from safetensors.torch import load_file, save_file

        path = self._own("safetensors")

        def save() -> None:
            save_file(self.state.tensors(), path)
            with path.open("rb") as file:
                os.fsync(file.fileno())

        yield "safetensors_save", self._measure(save)
        yield "safetensors_load", self._load(path.parent, lambda: self._copy_in(load_file(path)))
        self._remove(path.parent)

    def _plain(self) -> Iterator[tuple[str, dict]]:
        path = self._own("plain")

        def save() -> None:
            with path.open("wb", buffering=0) as file:
                for kind in KINDS:
                    _whole(file.write, memoryview(self.state.flat[kind].numpy()).cast("B"))
                os.fsync(file.fileno())

        def load() -> None:
            with path.open("rb", buffering=0) as file:
                for kind in KINDS:
                    _whole(file.readinto, memoryview(self.state.flat[kind].numpy()).cast("B"))

        yield "plain_write", self._measure(save)
        yield "plain_read", self._load(path.parent, load)
        self._remove(path.parent)

    def _copy_in(self, found: dict[str, torch.Tensor]) -> None:
        for name, tensor in self.state.tensors().items():
            tensor.copy_(found[name])

    def _own(self, name: str) -> Path:
        (self.folder / name).mkdir(exist_ok=True)
        return self.folder / name / f"rank-{self.rank}"

    def _load(self, path: Path, work: Callable[[], None]) -> dict[str, Any]:
        """Measure a load of files that are not in memory, into tensors that hold nothing, and look at the outcome."""
        self.state.wipe()
        self._forget(path)
        row = self._measure(work)
        self.equal = self.state.is_as_filled() and self.equal
        return row

    def _forget(self, path: Path) -> None:
        """Drop files from the page cache."""
        if self.rank == 0:
            for file in path.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())  # what is not written yet stays in the cache
                        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        dist.barrier()

    def _remove(self, path: Path) -> None:
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(path)
        dist.barrier()

    def _measure(self, work: Callable[[], Any]) -> dict[str, Any]:
        """Figures of the slowest rank, the largest growth of memory, bytes that all read from the disk."""
        dist.barrier()
        with _measured() as mine:
            work()
        rows: list = [None] * self.world_size
        dist.all_gather_object(rows, mine)
        return {**max(rows, key=lambda row: row["seconds"]), "growth_bytes": max(row["growth_bytes"] for row in rows),
                "disk_bytes": sum(row["disk_bytes"] for row in rows)}


@contextlib.contextmanager
def _measured() -> Iterator[dict[str, Any]]:
    """Figures of the block when it ends: seconds, those of the processor and in fsync, growth of memory, bytes read."""
    found, before, read = {}, _reset_peak(), _bytes_from_disk()
    started, processor = time.perf_counter(), time.process_time()
    with _timed_sync() as sync:
        yield found
    found |= {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - processor}
    found |= {"sync_seconds": sum(sync), "growth_bytes": _memory("VmHWM") - before,
              "disk_bytes": _bytes_from_disk() - read}


def _whole(move: Callable, view: memoryview) -> None:
    """Call ``move`` until all of ``view`` is through: a system call takes 2 GiB at most."""
    while view:
        done = move(view)
        if not done:
            raise OSError("the file ended too early")
        view = view[done:]


@contextlib.contextmanager
def _timed_sync() -> Iterator[list[float]]:
    """Seconds of every ``os.fsync`` of this process within the block."""
    real, seconds = os.fsync, []

    def fsync(handle: int) -> None:
        started = time.perf_counter()
        try:
            real(handle)
        finally:
            seconds.append(time.perf_counter() - started)

    os.fsync = fsync
    try:
        yield seconds
    finally:
        os.fsync = real


def _reset_peak() -> int:
    """Give free memory back to the system and start a new peak; returns what the process has now, in bytes."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # else work would first fill what work before it left free, and seem to need less
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    return _memory("VmRSS")


def _memory(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{key}:"))


def _bytes_from_disk() -> int:
    with open("/proc/self/io", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes:"))
