"""Build one shard from its drafts: read, decode and check every picture, write the tar, and note what went in."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any, Callable, Iterator

from PIL import Image

from megavg.data.builder.options import KEEP, BuildOptions
from megavg.data.builder.picture import Picture, open_picture
from megavg.data.builder.plan import Unit, row
from megavg.data.readers.base import Draft
from megavg.data.sample import SampleError, check_sample, record_json
from megavg.data.writer import encode_image, file_sha256, write_tar
from megavg.protocols.sample import Sample


@dataclass(frozen=True)
class ShardJob:
    """Everything a process needs to build shard ``number``; ``fingerprint`` is that of the whole plan."""

    number: int
    units: list[Unit]
    options: BuildOptions
    folder: str
    fingerprint: str


def tar_path(folder: str, number: int) -> str:
    """Where the finished shard ``number`` waits until the whole set is published."""
    return os.path.join(folder, f"{number:06d}.tar")


def entry_path(folder: str, number: int) -> str:
    """The side file of shard ``number``: where it stands, the shard beside it is whole."""
    return os.path.join(folder, f"{number:06d}.json")


def read_entry(folder: str, number: int, fingerprint: str) -> dict[str, Any] | None:
    """The side file of shard ``number`` when it belongs to the plan ``fingerprint``, else None."""
    try:
        with open(entry_path(folder, number), encoding="utf-8") as file:
            entry = json.load(file)
    except (OSError, ValueError):
        return None
    return entry if isinstance(entry, dict) and entry.get("fingerprint") == fingerprint else None


def build_shard(job: ShardJob, tick: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
    """Build shard ``job.number``, or take the one that an earlier, interrupted build has finished.

    Args:
        tick: called with the number of samples that were dealt with since the last call.

    Returns:
        The entry of the side file: "number", "num_samples", "bytes", "sha256", "fingerprint", "totals" (task, split
        and label -> name -> count), "left_out" (rows), "num_units" and "sources", see ``_sources``.

    Raises:
        SampleError: with ``on_error="raise"``, the first bad sample, naming its place and key.
        ValueError: with "skip", more than ``max_skipped`` bad samples in this shard alone.
    """
    entry = _finished(job)
    if entry is not None:
        tick(len(job.units))
        return entry
    left_out: list[dict[str, str]] = []
    totals: dict[str, Counter] = {"task": Counter(), "split": Counter(), "label": Counter()}
    path, sources = tar_path(job.folder, job.number), _sources(job)
    # Named after the process: one that was told to die may still write when its successor begins.
    beside = f"{path}.{os.getpid()}.tmp"
    try:
        written = write_tar(beside, _records(job, totals, left_out, tick))
        entry = {"number": job.number, "num_samples": written.num_samples, "bytes": written.num_bytes,
                 "sha256": written.sha256, "fingerprint": job.fingerprint, "totals": totals, "left_out": left_out,
                 "num_units": len(job.units), "sources": sources}
        os.replace(beside, path)
        write_json(entry_path(job.folder, job.number), entry)
    finally:
        if os.path.exists(beside):
            os.remove(beside)
    return entry


def write_json(path: str, value: Any, indent: int | None = None) -> None:
    """Write ``value`` as JSON beside ``path`` and rename it into place."""
    beside = f"{path}.{os.getpid()}.tmp"
    # A lone surrogate, of a file name or a bad row, becomes its JSON escape.
    with open(beside, "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(value, file, indent=indent, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _finished(job: ShardJob) -> dict[str, Any] | None:
    """The entry of a whole shard of an earlier build, if its pictures have not changed since.

    One that left bad samples out does not serve "raise".
    """
    entry = read_entry(job.folder, job.number, job.fingerprint)
    if entry is not None and (entry.get("num_units"), entry.get("sources")) != (len(job.units), _sources(job)):
        return None
    path = tar_path(job.folder, job.number)
    if entry is None or (entry["left_out"] and job.options.on_error == "raise") or not os.path.isfile(path):
        return None
    whole = os.path.getsize(path) == entry["bytes"] and file_sha256(path) == entry["sha256"]
    return entry if whole else None


def _sources(job: ShardJob) -> list[list[int]]:
    """[bytes, mtime_ns] of each picture file of the job, in its order; empty for a file that cannot be looked at."""
    found = []
    for path in dict.fromkeys(unit.draft.image.path for unit in job.units if unit.draft.image is not None):
        try:
            state = os.stat(path)
            found.append([state.st_size, state.st_mtime_ns])
        except (OSError, ValueError):
            found.append([])
    return found


def _records(job: ShardJob, totals: dict[str, Counter], left_out: list[dict[str, str]],
             tick: Callable[[int], None]) -> Iterator[tuple[str, dict[str, bytes]]]:
    options, desk = job.options, _Desk(job.options)
    for draft, turn in job.units:
        try:
            record = desk.record(draft, turn, totals)
        except SampleError as error:
            if options.on_error == "raise":
                raise
            left_out.append(row(draft, error.reason, error.detail, options.unit_key(draft.key, turn)))
            check_skipped(left_out, options)
        else:
            yield record
        tick(1)


def check_skipped(left_out: list[dict[str, str]], options: BuildOptions) -> None:
    """Raise ``ValueError`` when more bad samples were left out than ``max_skipped``."""
    if len(left_out) > options.max_skipped:
        last = left_out[-1]
        raise ValueError(f"{len(left_out)} bad samples were left out "
                         f"({dict(Counter(entry['reason'] for entry in left_out))}), more than "
                         f"max_skipped={options.max_skipped}; the last was {last['where']}: sample {last['key']!r}: "
                         f"{last['reason']}: {last['detail']}. Repair the source, or raise max_skipped.")


class _Desk:
    """Turns units into records; reads, decodes and encodes a picture once while consecutive drafts share it."""

    def __init__(self, options: BuildOptions):
        self.options = options
        self._source: Any = None
        self._picture: Picture | None = None
        self._encoded: tuple[Image.Image | None, bytes] = (None, b"")

    def record(self, draft: Draft, turn: int, totals: dict[str, Counter]) -> tuple[str, dict[str, bytes]]:
        """Key and members of one sample, checked as a reader of the shard will check it; counts it in ``totals``."""
        sample, picture = self._load(draft)
        sample = self.options.reshape(sample, turn)
        check_sample(sample)
        members = {"json": record_json(sample)}
        if self.options.image_format == KEEP and picture is not None and sample.image is picture.image:
            members[picture.suffix] = picture.data
        else:
            suffix = "png" if self.options.image_format == KEEP else self.options.image_format
            members[suffix] = self._encode(sample.image, suffix)
        _count(sample, totals)
        return sample.key, members

    def _load(self, draft: Draft) -> tuple[Sample, Picture | None]:
        if draft.image is None:
            return draft.load(), None
        # The fields first: a bad box is told without decoding its picture.
        sample = draft.outline()
        picture = self._open(draft)
        if picture.image.size != (sample.width, sample.height):
            raise SampleError(draft.where, draft.key, "size mismatch",
                              f"the record says {sample.width} x {sample.height}, the picture {draft.image} is "
                              f"{picture.image.width} x {picture.image.height}")
        return dataclasses.replace(sample, image=picture.image, shard=draft.where), picture

    def _open(self, draft: Draft) -> Picture:
        if self._picture is None or draft.image != self._source:
            self._picture = None
            self._source, self._picture = draft.image, open_picture(draft)
        return self._picture

    def _encode(self, image: Image.Image, suffix: str) -> bytes:
        if self._encoded[0] is not image:
            self._encoded = (image, encode_image(image, suffix))
        return self._encoded[1]


def _count(sample: Sample, totals: dict[str, Counter]) -> None:
    totals["task"][sample.task] += 1
    if isinstance(sample.meta.get("split"), str):
        totals["split"][sample.meta["split"]] += 1
    named = sample.labels or [sample.meta[name] for name in ("label", "category") if name in sample.meta][:1]
    for label in named:
        if isinstance(label, str):
            totals["label"][label] += 1
