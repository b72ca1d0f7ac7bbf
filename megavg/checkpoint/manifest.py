"""What a checkpoint consists of: the list of its files with sizes and checksums, and what wrote it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import time
from pathlib import Path
from typing import Any, Iterable

import megavg
from megavg.checkpoint.errors import CheckpointError
from megavg.protocols.life import goes_on

MANIFEST = "manifest.json"
FORMAT = 1
_READ_BYTES = 1 << 20
_PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers")


def facts_of(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Path relative to ``folder`` -> {bytes, sha256} of each file, read from where it was written."""
    facts, buffer = {}, memoryview(bytearray(_READ_BYTES))  # one for all: what read() gives, two at a time would stay
    for path in files:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                goes_on()
        facts[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return facts


def write_manifest(folder: Path, files: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
    """Write the list of ``files`` beside what the checkpoint is ``about``: it makes the checkpoint whole."""
    content = {"format": FORMAT, **about, "versions": _versions(),
               "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "files": dict(sorted(files.items()))}
    content["sha256"] = _digest(content)
    write_synced(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer format.
    """
    path = Path(folder) / MANIFEST
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no whole checkpoint: it has no {MANIFEST}") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); take the checkpoint before") from error
    if not isinstance(content, dict) or content.pop("sha256", None) != _digest(content):
        raise CheckpointError(f"{path} is damaged: its own checksum does not fit; take the checkpoint before")
    if content["format"] > FORMAT:
        raise CheckpointError(f"{path} has format {content['format']}, this megavg reads up to {FORMAT}; use the newer "
                              "megavg that wrote it")
    return content


def wrong_files(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each of ``files`` that is not as the manifest says; reads them all."""
    wrong = []
    for name, expected in files.items():
        path = Path(folder) / name
        try:
            if not path.exists():
                wrong.append(f"{path} is missing")
            elif path.stat().st_size != expected["bytes"]:
                wrong.append(f"{path} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}: it is "
                             "truncated or was changed")
            elif facts_of(folder, [path])[name]["sha256"] != expected["sha256"]:
                wrong.append(f"{path} is damaged: its checksum is not that of the {MANIFEST}")
        except OSError as error:
            wrong.append(f"{path} cannot be read ({error})")
    return wrong


def write_synced(path: Path, text: str) -> None:
    """Write a small file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Wait until a file that others wrote is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems cannot; the files themselves are synced
    finally:
        os.close(handle)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {"megavg": megavg.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
