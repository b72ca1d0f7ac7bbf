"""Compiled extensions after a kill: torch locks a folder while it compiles or checks it, and waits for ever for a lock.

A process that is killed leaves its lock behind, and every later start would hang on it without a word.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from pathlib import Path
from typing import Iterator

COMPILING_SECONDS, CHECKING_SECONDS = 1800.0, 300.0
"""A lock that is older is nobody's, in a folder where something is compiled and in one that is only looked at again.

Whoever holds a lock ends with an error when it is gone: better to wait too long.
"""
_PERIOD = 1.0

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def stale_locks_removed() -> Iterator[None]:
    """While the block loads compiled extensions, remove locks that killed processes have left."""
    done = threading.Event()

    def look() -> None:
        while True:
            try:
                remove_stale_locks(extensions_folder())
            except OSError as error:
                logger.warning("locks of compiled extensions cannot be looked at: %s", error)
            if done.wait(_PERIOD):
                return

    thread = threading.Thread(target=look, daemon=True, name="stale locks")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def extensions_folder() -> Path:
    """Where torch keeps what is compiled at its first use."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def remove_stale_locks(folder: Path) -> list[Path]:
    """Remove the locks under ``folder`` that are older than any compilation; returns them."""
    removed = []
    for lock in (*folder.glob("*/lock"), *folder.glob("*/*/lock")):
        try:
            since = lock.stat().st_mtime
            made = [path.stat().st_mtime for path in lock.parent.iterdir() if path.suffix in (".so", ".o")]
            # else it is being compiled, or compiled anew
            is_built = any(lock.parent.glob("*.so")) and max(made) < since
            if time.time() - max(since, *made, since) < (CHECKING_SECONDS if is_built else COMPILING_SECONDS):
                continue
            lock.unlink()
        except FileNotFoundError:  # its process, or another one that looks, was quicker
            continue
        removed.append(lock)
        logger.warning("removed %s, which a process that was killed has left", lock)
    return removed
