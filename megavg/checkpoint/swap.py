"""Folders that are written beside their place and renamed: what was there before stays whole until then.

Names of what is half written or set aside are this project's own, so that nobody else's folder is taken for one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megavg.checkpoint.manifest import sync_file, sync_folder
from megavg.protocols.life import goes_on


def place_of(out: str | Path) -> Path:
    """The folder that ``out`` means: what a link points to, so that it is that which is replaced and not the link."""
    return Path(os.path.realpath(out))


def beside(final: Path) -> Path:
    """Where the folder ``final`` is written."""
    return final.with_name(f".{final.name}.megavg-new")


def set_aside(final: Path) -> Path:
    """Where the folder that was at ``final`` is while another takes its place."""
    return final.with_name(f".{final.name}.megavg-old")


def begin(final: Path) -> Path:
    """Make the empty folder ``beside(final)``, without what a process that was killed has left there."""
    partial = beside(final)
    remove(partial)
    partial.mkdir(parents=True)
    return partial


def finish(final: Path) -> None:
    """Put the folder ``beside(final)`` in its place, once all of it is on the disk; then the one before goes."""
    partial, old = beside(final), set_aside(final)
    for folder, _, files in os.walk(partial):
        for name in files:
            sync_file(Path(folder, name))
            goes_on()
        sync_folder(Path(folder))
    replace(partial, final, old)


def replace(partial: Path, final: Path, old: Path) -> None:
    """Rename ``partial`` to ``final``, what is there to ``old`` before; ``old`` goes when the names are on the disk."""
    remove(old)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    sync_folder(final.parent)
    remove(old)


def remove(path: Path) -> None:
    """Remove a folder, a file, or a link (and not what it points to); nothing there is fine."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
