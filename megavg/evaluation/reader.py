"""Walk through an evaluation set once: every sample is noted, and those this rank has to answer are decoded."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from typing import Any, Collection, Iterator, Mapping

from megavg.data.sample import RawRecord, SampleError, parse_record, with_image
from megavg.data.shards import expand_shards
from megavg.data.skips import SkipLog
from megavg.data.tars import walk_shards
from megavg.data.writer import INDEX_NAME
from megavg.protocols.sample import Sample

AS_TASKS = ("rec", "point")
"""Tasks whose samples may be asked as the other one."""


class SetReader:
    """Iterate over the samples that this rank has to answer, decoded; afterwards look at what the set holds.

    Every rank reads the texts of all records and sees the same set; only the owner of a sample decodes its picture.
    The samples that are still to be answered are dealt out one by one, so that no rank gets more than its share,
    also when a part of the set was answered before. One instance is iterated over once.

    Args:
        shards: paths or patterns, see ``expand_shards``.
        rank, num_ranks: this rank's place among those that share the set.
        on_error: "raise" ends with the first bad record; "skip" leaves it out and counts it.
        max_skipped: more left-out records than this are an error.
        limit: at most so many samples, the first ones; 0 takes all.
        where: name in ``Sample.meta`` -> the value, or list of values, that a sample must have to be in the set.
        as_task: "rec" or "point": ask every sample as this task, whose own must be one of the two; "" leaves each its
            own.
        answered: (shard, key) of samples that need no answer any more.

    Attributes:
        samples: every sample of the set without its picture, in stored order, whoever answers it. One whose picture
            proves broken stays in here on the ranks that did not decode it: see ``skips.entries``.
        num_filtered: records that ``where`` left out.
        skips: what was left out as bad; a broken picture is known to the rank alone that decoded it.
    """

    def __init__(self, shards: str | list[str], rank: int = 0, num_ranks: int = 1, on_error: str = "raise",
                 max_skipped: int = 100, limit: int = 0, where: Mapping[str, Any] | None = None, as_task: str = "",
                 answered: Collection[tuple[str, str]] = ()):
        self.shards, self.rank, self.num_ranks, self.limit = expand_shards(shards), rank, num_ranks, limit
        self.where, self.as_task, self.answered = dict(where or {}), as_task, answered
        self.samples: list[Sample] = []
        self.num_filtered = 0
        self.skips = SkipLog(on_error, max_skipped, level=logging.WARNING if rank == 0 else logging.DEBUG)
        self._records: dict[tuple[str, str], int] = {}

    def __iter__(self) -> Iterator[Sample]:
        place = 0
        for record in walk_shards(self.shards):
            if self.limit and len(self.samples) >= self.limit:
                return
            if isinstance(record, SampleError):
                self.skips.handle(record)
                continue
            sample = self._parse(record)
            if sample is None:
                continue
            self.samples.append(sample)
            if (sample.shard, sample.key) in self.answered:
                continue
            place += 1
            if (place - 1) % self.num_ranks == self.rank:
                decoded = self._decode(sample, record)
                if decoded is not None:
                    yield decoded

    def left_out(self, entries: Collection[tuple]) -> set[tuple[str, str]]:
        """(shard, key) of the samples whose pictures proved broken on any rank; ``entries`` are all ranks' skips."""
        broken = {(shard, index) for shard, index, *_ in entries}
        return {name for name, index in self._records.items() if (name[0], index) in broken}

    def skipped_entries(self) -> list[tuple]:
        """(shard, index, key, reason) of each record that this rank left out: gather them and take each once."""
        return [(shard, index, key, reason) for (shard, index), (key, reason) in self.skips.entries.items()]

    def _parse(self, record: RawRecord) -> Sample | None:
        try:
            sample = parse_record(record)
            if any(not _fits(sample.meta.get(name), wanted) for name, wanted in self.where.items()):
                self.num_filtered += 1
                return None
            if (sample.shard, sample.key) in self._records:
                raise SampleError(record.shard, sample.key, "bad key", "two records of this shard have this key, so "
                                  "their answers could not be told apart; give each its own")
        except SampleError as error:
            self.skips.handle(error, record.index)
            return None
        self._records[sample.shard, sample.key] = record.index
        if self.as_task:
            if sample.task not in AS_TASKS:
                raise ValueError(f"{sample.shard}: sample {sample.key!r} is of task {sample.task!r}, but the set's "
                                 f"task: {self.as_task} takes samples of {' and '.join(AS_TASKS)} alone; leave the "
                                 "set's task empty, or keep such samples out by where or by other shards")
            sample = dataclasses.replace(sample, task=self.as_task)
        return sample

    def _decode(self, sample: Sample, record: RawRecord) -> Sample | None:
        try:
            return with_image(sample, record)
        except SampleError as error:
            self.skips.handle(error, record.index)
            return None


def _fits(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, (list, tuple)) else value == wanted


def pictures_of(shards: str | list[str], names: Collection[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """The decoded pictures of some samples, by (shard, key); one that cannot be read is missing."""
    missing, found = set(names), {}
    shards = [shard for shard in expand_shards(shards) if any(shard == name[0] for name in missing)]
    for record in walk_shards(shards):
        if not missing:
            break
        if isinstance(record, SampleError):
            continue
        try:
            sample = parse_record(record)
            if (sample.shard, sample.key) in missing:
                missing.discard((sample.shard, sample.key))
                found[sample.shard, sample.key] = with_image(sample, record).image
        except SampleError:
            continue
    return found


def indexed(shards: str | list[str]) -> list[dict | None]:
    """What the index.json beside each shard says of it (num_samples, sha256, ...); None for one without an entry.

    Raises:
        ValueError: an index cannot be read.
    """
    indexes: dict[str, dict[str, dict]] = {}
    found = []
    for shard in expand_shards(shards):
        path = os.path.join(os.path.dirname(shard), INDEX_NAME)
        if path not in indexes:
            indexes[path] = _read_index(path) if os.path.isfile(shard) and os.path.isfile(path) else {}
        found.append(indexes[path].get(os.path.basename(shard)))
    return found


def _read_index(path: str) -> dict[str, dict]:
    try:
        with open(path, encoding="utf-8") as file:
            return {entry["name"]: {**entry, "num_samples": int(entry["num_samples"])}
                    for entry in json.load(file)["shards"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); build the shards again, or remove it") from error


def indexed_count(shards: str | list[str]) -> int | None:
    """How many records the indexes say that all shards hold; None where a shard has no entry in one."""
    entries = indexed(shards)
    return None if None in entries else sum(entry["num_samples"] for entry in entries)


def check_index(shards: str | list[str]) -> None:
    """Raise ValueError where a shard holds another number of records than its index.json says; headers are read.

    Torn shards are passed over: whoever reads them tells.
    """
    for shard, entry in zip(expand_shards(shards), indexed(shards)):
        if entry is None:
            continue
        records = list(map(type, walk_shards([shard])))
        if records.count(RawRecord) == len(records) != entry["num_samples"]:
            raise ValueError(f"{shard} holds {len(records)} records, but the index.json beside it says "
                             f"{entry['num_samples']}; build the shards again, or remove index.json if they were "
                             "changed on purpose")
