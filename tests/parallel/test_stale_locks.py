"""A lock that a killed process has left does not keep later starts waiting for ever."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from megavg.parallel.stale_locks import (CHECKING_SECONDS, COMPILING_SECONDS, extensions_folder, remove_stale_locks,
                                         stale_locks_removed)
from tools.forked_ranks import Job


def lock(folder: Path, age: float, built: bool = False) -> Path:
    folder.mkdir(parents=True)
    if built:
        (folder / "op.so").touch()
        os.utime(folder / "op.so", (time.time() - age - 60,) * 2)
    (folder / "lock").touch()
    os.utime(folder / "lock", (time.time() - age,) * 2)
    return folder / "lock"


def test_only_locks_that_nobody_can_hold_go(tmp_path):
    old = lock(tmp_path / "a", COMPILING_SECONDS + 1)
    looked_at = lock(tmp_path / "py311_cpu" / "b", CHECKING_SECONDS + 1, built=True)
    kept = [lock(tmp_path / "c", COMPILING_SECONDS - 60), lock(tmp_path / "d", CHECKING_SECONDS - 60, built=True),
            lock(tmp_path / "e", CHECKING_SECONDS + 60, built=True)]
    (tmp_path / "e" / "op.o").touch()  # it is being compiled anew
    assert sorted(remove_stale_locks(tmp_path)) == [old, looked_at]
    assert not old.exists() and all(path.exists() for path in kept)
    assert remove_stale_locks(tmp_path / "nowhere") == []


def test_a_start_waits_no_longer_for_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = lock(tmp_path / "op", COMPILING_SECONDS - 1.5)  # stale in a moment
    waiting = threading.Thread(target=FileBaton(str(path)).wait, daemon=True)
    with stale_locks_removed():
        waiting.start()
        waiting.join(20)
        assert not waiting.is_alive()
    assert "a process that was killed" in caplog.text


def meet() -> int:
    from megavg.parallel.mcore import start_processes

    start_processes(timeout_minutes=3)
    return 0


def test_processes_start_in_spite_of_it(tmp_path, monkeypatch):
    """With the extension that DeepSpeed loads on a CPU, as a killed start leaves it."""
    if not any(extensions_folder().rglob("*.so")):
        pytest.skip("DeepSpeed's extension is not compiled yet: make setup does it")
    # other tests' processes take and leave locks there meanwhile
    folder = shutil.copytree(extensions_folder(), tmp_path / "extensions", ignore=shutil.ignore_patterns("lock"))
    locks = [path.parent / "lock" for path in folder.rglob("*.so")]
    for path in folder.rglob("*.*o"):
        os.utime(path, (time.time() - 2 * CHECKING_SECONDS,) * 2)
    for path in locks:
        path.touch()
        os.utime(path, (time.time() - CHECKING_SECONDS,) * 2)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    with Job(tmp_path / "log", 1, meet) as job:
        assert job.wait(150) == [0], job.last_lines()
    assert not any(path.exists() for path in locks)
