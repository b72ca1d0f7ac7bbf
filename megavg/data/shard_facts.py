"""Read one finished shard from end to end and note everything a report needs, in little memory beside the pictures."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Callable

from megavg.data.sample import IMAGE_SUFFIXES, RawRecord, SampleError, parse_record, with_image
from megavg.data.tars import read_records
from megavg.data.writer import file_sha256
from megavg.protocols.sample import Sample

HEAT_CELLS = 8
MAX_PROBLEMS = 1000  # of one shard; the number is counted beyond that


@dataclass(frozen=True)
class Seen:
    """What is remembered of a sample to find it, or its picture, a second time."""

    key: str
    picture: bytes
    question: bytes
    split: str


@dataclass
class ShardFacts:
    """What one shard holds.

    Attributes:
        problems: (reason, key, detail) of records that a training run could not use, the first 1000.
        num_problems: all of them, by reason.
        seen: one entry per usable sample, in order.
        boxes_per_sample: number of boxes -> number of samples.
        area_shares, aspects, short_sides_px: of every box: part of the picture, width / height, pixels.
        heat: number of boxes whose centre lies in each of 8 x 8 cells of the picture, row by row.
        sizes: (width, height) of the picture -> number of samples.
        chosen: (chance, place) of the samples to show, see ``inspect_shard``.
    """

    path: str
    num_bytes: int
    sha256: str
    num_samples: int = 0
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    num_problems: Counter = field(default_factory=Counter)
    seen: list[Seen] = field(default_factory=list)
    tasks: Counter = field(default_factory=Counter)
    splits: Counter = field(default_factory=Counter)
    labels: Counter = field(default_factory=Counter)
    picture_formats: Counter = field(default_factory=Counter)
    sizes: Counter = field(default_factory=Counter)
    boxes_per_sample: Counter = field(default_factory=Counter)
    area_shares: list[float] = field(default_factory=list)
    aspects: list[float] = field(default_factory=list)
    short_sides_px: list[float] = field(default_factory=list)
    heat: list[int] = field(default_factory=lambda: [0] * HEAT_CELLS**2)
    chosen: list[tuple[str, int]] = field(default_factory=list)

    def add(self, record: RawRecord, sample: Sample) -> None:
        """Count one usable sample; ``sample.image`` is decoded."""
        self.num_samples += 1
        self.seen.append(_seen(sample))
        self.tasks[sample.task] += 1
        if isinstance(sample.meta.get("split"), str):
            self.splits[sample.meta["split"]] += 1
        self.labels.update(sample.labels)
        self.picture_formats[next(suffix for suffix in IMAGE_SUFFIXES if suffix in record.files)] += 1
        self.sizes[sample.width, sample.height] += 1
        self.boxes_per_sample[len(sample.boxes_xyxy_px)] += 1
        for x0, y0, x1, y1 in sample.boxes_xyxy_px:
            self.area_shares.append((x1 - x0) * (y1 - y0) / (sample.width * sample.height))
            self.aspects.append((x1 - x0) / (y1 - y0))
            self.short_sides_px.append(min(x1 - x0, y1 - y0))
            self.heat[_cell((y0 + y1) / 2, sample.height) * HEAT_CELLS + _cell((x0 + x1) / 2, sample.width)] += 1

    def add_problem(self, error: SampleError) -> None:
        """Count one record that cannot be used."""
        self.num_problems[error.reason] += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append((error.reason, error.key, error.detail))


def _cell(place: float, extent: int) -> int:
    return min(int(place / extent * HEAT_CELLS), HEAT_CELLS - 1)


def _seen(sample: Sample) -> Seen:
    # Decoded pixels, so that a picture is known again after it was stored in another format without loss.
    pixels = hashlib.blake2b(sample.image.tobytes(), digest_size=16, key=repr(sample.image.size).encode())
    question = json.dumps([sample.task, sample.expression, sample.boxes_xyxy_px, sample.labels])
    return Seen(sample.key, pixels.digest(), hashlib.blake2b(question.encode(), digest_size=16).digest(),
                str(sample.meta.get("split", "")))


@dataclass(frozen=True)
class InspectJob:
    """One shard to read, and how many of its samples may be shown."""

    path: str
    seed: int = 0
    num_chosen: int = 0


def inspect_shard(job: InspectJob, tick: Callable[[int], None] = lambda count: None) -> ShardFacts:
    """Read ``job.path`` as training reads it: every record parsed, every picture decoded.

    ``chosen`` of the result holds the ``num_chosen`` samples with the lowest chances; these depend on the seed and the
    key alone, so that the same samples are shown however the set is cut into shards.

    Raises:
        OSError: the file cannot be read at all.
    """
    facts = ShardFacts(job.path, os.path.getsize(job.path), file_sha256(job.path))
    try:
        for record in read_records(job.path):
            _inspect(record, facts, job)
            tick(1)
    except SampleError as error:
        facts.add_problem(error)
    return facts


def _inspect(record: RawRecord, facts: ShardFacts, job: InspectJob) -> None:
    try:
        sample = with_image(parse_record(record), record)
    except SampleError as error:
        facts.add_problem(error)
        return
    facts.add(record, sample)
    if job.num_chosen:
        chance = hashlib.sha256(f"{job.seed}/{sample.key}".encode()).hexdigest()
        facts.chosen = sorted([*facts.chosen, (chance, record.index)])[:job.num_chosen]


def samples_at(path: str, places: set[int]) -> dict[int, Sample]:
    """The decoded samples at ``places`` (record numbers from 0) of the shard ``path``."""
    found = {}
    for record in read_records(path):
        if record.index in places:
            found[record.index] = with_image(parse_record(record), record)
            if len(found) == len(places):
                break
    return found
