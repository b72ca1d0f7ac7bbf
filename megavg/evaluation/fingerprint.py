"""Know whether answers on disk belong to the evaluation that is asked for, and open the folder they lie in."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from megavg.evaluation.answer_log import ANSWERS, read_answers
from megavg.evaluation.reader import indexed
from megavg.protocols.restarts import is_of_this_job, note_job

FINGERPRINT = "fingerprint.json"


def open_set(folder: Path, fingerprint: dict[str, Any], overwrite: bool) -> dict[tuple[str, str], dict]:
    """Make or go on with the folder of one set: the answers that are there and belong to this evaluation.

    Args:
        folder: of this set alone.
        fingerprint: JSON values by name: all that an answer depends on.
        overwrite: remove what an earlier evaluation left in the folder; not what an earlier start of this job has.

    Raises:
        ValueError: the folder holds answers of another model, set, prompt or way to generate.
    """
    folder = Path(folder)
    path = folder / FINGERPRINT
    if overwrite and not is_of_this_job(folder):
        _remove(folder)
    if path.is_file():
        _compare(path, fingerprint)
        return read_answers(folder)
    if any((folder / ANSWERS).glob("*.jsonl")):
        raise ValueError(f"{folder / ANSWERS} holds answers, but {path} is missing, which says whose they are; set "
                         "evaluation.overwrite=true to replace them, or choose another evaluation.output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    note_job(folder)
    write_beside(path, json.dumps(fingerprint, indent=2) + "\n")
    return {}


def _compare(path: Path, fingerprint: dict[str, Any]) -> None:
    try:
        saved = json.loads(path.read_text())
        names = [name for name in fingerprint | saved if saved.get(name) != fingerprint.get(name)]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); set evaluation.overwrite=true to begin anew") from error
    if names:
        changes = "; ".join(f"{name} was {_short(saved.get(name))}, is {_short(fingerprint.get(name))}"
                            for name in names)
        raise ValueError(f"{path.parent} holds answers of another evaluation ({changes}); choose another "
                         "evaluation.output_dir, or set evaluation.overwrite=true to answer the whole set again")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:60]}...{text[-50:]}"


def _remove(folder: Path) -> None:
    """Remove what an evaluation writes into a set's folder; the fingerprint goes last."""
    shutil.rmtree(folder / ANSWERS, ignore_errors=True)
    for name in ("rows.jsonl", "worst.jsonl", "worst.png", FINGERPRINT):
        (folder / name).unlink(missing_ok=True)


def write_beside(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it, so that a reader never sees half of it."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def describe_shards(shards: list[str]) -> list[list]:
    """[path, bytes, content] of every shard; bytes is None for a URL or a pipe.

    The content is the sha256 that an index.json says, or else when the file was last written: shards that were built
    anew are noticed although their sizes are equal, and so are shards that were merely copied anew.
    """
    return [[shard, *_file_facts(shard, entry or {})] for shard, entry in zip(shards, indexed(shards))]


def _file_facts(shard: str, entry: dict) -> list:
    if not os.path.isfile(shard):
        return [None, entry.get("sha256")]
    facts = os.stat(shard)
    return [facts.st_size, entry.get("sha256") or f"written at {facts.st_mtime_ns} ns"]


def describe_checkpoint(directory: str | Path) -> dict[str, str]:
    """File name -> digest of everything in a checkpoint that an answer depends on.

    Small files are hashed whole. Of a safetensors file the header and 64 KiB in the middle of every tensor are: two
    checkpoints of one training differ in nearly every tensor, and reading them whole would take minutes.
    """
    found = {}
    for path in sorted(path for path in Path(directory).iterdir() if path.is_file()):
        if path.suffix in (".json", ".jinja", ".model", ".txt"):
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
        elif path.suffix == ".safetensors":
            found[path.name] = _weights_digest(path)
    return found


def _weights_digest(path: Path, part: int = 1 << 16) -> str:
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        digest.update(header)
        start = file.tell()
        try:
            tensors = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read ({error!r}); it is truncated or no safetensors file: copy it "
                             "again") from error
        for first, last in sorted(map(tuple, tensors)):
            file.seek(start + max(first, (first + last - part) // 2))
            digest.update(file.read(min(part, last - first)))
    return digest.hexdigest()[:32]
