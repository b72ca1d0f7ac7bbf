"""Read shards: as an endless, seeded, resumable source of training batches, or once in order for evaluation.

The order of samples is GLOBAL. Every data-parallel rank walks through the same shuffled stream of undecoded records,
cuts it into the same global batches, and decodes only its own share of each, so that a run does not depend on how many
ranks it has. Reading every shard on every rank is cheap beside decoding, and cheap beside a step of RL.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import random
from collections import Counter
from typing import Iterable, Iterator

from megavg.data.noise import add_noise
from megavg.data.sample import RawRecord, SampleError, parse_record, with_image
from megavg.data.skips import SkipLog
from megavg.data.tars import chain_shards
from megavg.protocols.options import LabelNoise
from megavg.protocols.sample import Sample


def expand_shards(patterns: str | list[str]) -> list[str]:
    """List the tar files that ``patterns`` name, in their order, each once.

    A pattern is a path, a glob ("data/*.tar"), a brace range ("data/train-{000000..000007}.tar") or a folder, which
    means its ``*.tar`` in name order.

    Raises:
        ValueError: when a pattern, or one path of a brace range, matches no file.
    """
    import braceexpand

    shards: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for path in [pattern] if os.path.exists(pattern) else braceexpand.braceexpand(pattern):
            found = _matches(path)
            if not found:
                part = "" if path == pattern else f" (part of {pattern!r})"
                raise ValueError(f"no shard matches {path!r}{part}: expected an existing tar file, a folder of *.tar "
                                 f"files, a glob or a brace range; the current folder is {os.getcwd()}")
            shards += found
    if not shards:
        raise ValueError("no shards given: expected at least one path, folder, glob or brace range")
    return list(dict.fromkeys(shards))


def _matches(path: str) -> list[str]:
    if os.path.isdir(path):
        return sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
    if os.path.isfile(path):
        return [path]
    return sorted(found for found in glob.glob(path) if os.path.isfile(found))


def shuffled(records: Iterable[RawRecord], buffer_size: int, rng: random.Random) -> Iterator[RawRecord]:
    """Shuffle a stream through a buffer of at most ``buffer_size`` records; 1 keeps the order."""
    buffer: list[RawRecord] = []

    def pick() -> RawRecord:
        place = rng.randrange(len(buffer))
        buffer[place], buffer[-1] = buffer[-1], buffer[place]
        return buffer.pop()

    for record in records:
        buffer.append(record)
        if len(buffer) == buffer_size:
            yield pick()
    while buffer:
        yield pick()


def iterate_all(shards: str | list[str], on_error: str = "raise", max_skipped: int = 100,
                skipped: Counter | None = None, rank: int = 0, num_ranks: int = 1) -> Iterator[Sample]:
    """Yield every sample of ``shards`` once, decoded and in stored order, as evaluation needs it.

    Args:
        shards: paths or patterns, see ``expand_shards``.
        on_error, max_skipped: as in ``PromptSource``.
        skipped: a ``Counter`` that receives the number of skipped records by reason, those of all ranks.
        rank, num_ranks: yield samples rank, rank + num_ranks, ... only; the others' images are decoded in skip mode
            alone, as ``PromptSource`` does and for its reason.
    """
    skips = SkipLog(on_error, max_skipped, skipped, level=logging.WARNING if rank == 0 else logging.DEBUG)
    return _owned(chain_shards(expand_shards(shards), skips.handle), skips, rank, num_ranks)


def _owned(records: Iterable[RawRecord], skips: SkipLog, rank: int, num_ranks: int) -> Iterator[Sample]:
    place = 0
    for record in records:
        mine = place % num_ranks == rank
        sample = _read(record, skips, decode=mine or skips.skipping)
        if sample is not None:
            place += 1
            if mine:
                yield sample


def _read(record: RawRecord, skips: SkipLog, decode: bool, noise: LabelNoise = LabelNoise()) -> Sample | None:
    """The sample of ``record``, without its image unless ``decode``; None when the record is left out."""
    try:
        sample = add_noise(parse_record(record), noise)  # on every rank: all must leave out the same records
        return with_image(sample, record) if decode else sample
    except SampleError as error:
        skips.handle(error, record.index)
        return None


class PromptSource:
    """Hand out this rank's share of seeded global batches, and resume exactly, also under another ``dp_size``.

    Rank r receives items r, r + dp_size, r + 2 dp_size, ... of each global batch. Epoch e shuffles the order of the
    shards, then the records through a buffer, both seeded by (seed, e); batches run on across the end of an epoch.

    Args:
        shards: paths or patterns, see ``expand_shards``.
        batch_size: samples of a GLOBAL batch; a multiple of ``dp_size``.
        seed: of the order.
        dp_rank, dp_size: this rank's place among the data-parallel ranks.
        shuffle_buffer: undecoded records held in memory for shuffling; 1 shuffles the shards only.
        on_error: "raise" stops at a bad record: on every rank when its JSON or tar is bad, on the rank that owns it
            when its image does not decode. "skip" leaves it out, and all ranks must agree on that without talking to
            each other: so in this mode EVERY rank decodes every image of the global batch (``batch_size`` decodes per
            batch instead of ``batch_size / dp_size``). Use it for shards that are not known to be clean.
        max_skipped: number of skipped records that is still accepted; a torn shard counts as one.
        infinite: False ends with ``StopIteration`` after the last full batch of one epoch.
        noise: wrong labels for a share of the samples; none by default.

    Attributes:
        skipped: ``Counter`` of skipped records by reason, equal on every rank; a record counts once, not every epoch.
    """

    def __init__(self, shards: str | list[str], batch_size: int, seed: int, dp_rank: int = 0, dp_size: int = 1,
                 shuffle_buffer: int = 1000, on_error: str = "raise", max_skipped: int = 100, infinite: bool = True,
                 noise: LabelNoise = LabelNoise()):
        if dp_size < 1 or not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank={dp_rank} is not a rank of dp_size={dp_size}")
        if batch_size < 1 or batch_size % dp_size:
            raise ValueError(f"batch_size={batch_size} is not a positive multiple of the data-parallel size {dp_size}; "
                             "change the batch size or the number of ranks")
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer={shuffle_buffer}: expected at least 1 (no shuffling inside a shard)")
        self.shards = expand_shards(shards)
        self.batch_size, self.seed, self.infinite, self.noise = batch_size, seed, infinite, noise
        self.dp_rank, self.dp_size, self.shuffle_buffer = dp_rank, dp_size, shuffle_buffer
        # All ranks skip alike, so one of them is enough to say it.
        self._skips = SkipLog(on_error, max_skipped, level=logging.WARNING if dp_rank == 0 else logging.DEBUG)
        self.skipped = self._skips.counts
        self._begin(epoch=0)
        self._position = (0, 0)

    def _begin(self, epoch: int) -> None:
        rng = random.Random(f"megavg.data.shards/{self.seed}/{epoch}")
        order = list(self.shards)
        rng.shuffle(order)
        self._epoch, self._consumed = epoch, 0
        self._records = shuffled(chain_shards(order, self._skips.handle), self.shuffle_buffer, rng)

    def next_batch(self) -> list[Sample]:
        """Return the ``batch_size / dp_size`` samples that this rank owns of the next global batch.

        Raises:
            StopIteration: with ``infinite=False``, when no full batch is left.
            SampleError: a bad record, with ``on_error="raise"``.
            ValueError: more than ``max_skipped`` bad records, or an epoch without one usable sample.
        """
        batch: list[Sample] = []
        place = 0
        while place < self.batch_size:
            record = self._next_record()
            mine = place % self.dp_size == self.dp_rank
            if self._skips.skipping and self._skips.knows(record):
                continue
            sample = _read(record, self._skips, decode=mine or self._skips.skipping, noise=self.noise)
            if sample is None:
                continue
            if mine:
                batch.append(sample)
            self._consumed += 1
            place += 1
        self._position = (self._epoch, self._consumed)
        return batch

    def __iter__(self) -> PromptSource:
        return self

    __next__ = next_batch

    def _next_record(self) -> RawRecord:
        while (record := next(self._records, None)) is None:
            if not self.infinite:
                raise StopIteration
            if self._consumed == 0:
                raise ValueError(f"no usable sample in {len(self.shards)} shards starting with {self.shards[0]!r}; "
                                 f"skipped: {dict(self.skipped)}")
            self._begin(self._epoch + 1)
        return record

    def state_dict(self) -> dict:
        """The position after the last whole batch, as plain JSON; the same on every rank."""
        places = {shard: number for number, shard in enumerate(self.shards)}
        skipped = [[places[shard], index, key, reason] for (shard, index), (key, reason) in self._skips.entries.items()]
        epoch, consumed = self._position
        return {"epoch": epoch, "consumed": consumed, "skipped": skipped, "fingerprint": self._fingerprint()}

    def load_state_dict(self, state: dict) -> None:
        """Continue after the batches that ``state`` had seen, under any ``dp_size`` and ``batch_size``.

        The current epoch is read again up to that position, without decoding an image.

        Raises:
            ValueError: when ``state`` belongs to other shards, or another seed, shuffle buffer or noise.
        """
        saved, own = state["fingerprint"], self._fingerprint()
        differing = [f"{name}: saved {saved.get(name)!r}, now {own.get(name)!r}" for name in own | saved
                     if saved.get(name) != own.get(name)]
        if differing:
            raise ValueError("this position belongs to another order of samples (" + "; ".join(differing) + "); "
                             "give the same shards, seed, shuffle_buffer and noise, or start from the beginning")
        for place, index, key, reason in state["skipped"]:
            self._skips.restore(self.shards[place], index, key, reason)
        self._begin(state["epoch"])
        while self._consumed < state["consumed"]:
            record = next(self._records, None)
            if record is None:
                raise ValueError(f"the shards end after {self._consumed} of {state['consumed']} samples that the saved "
                                 "position had consumed in this epoch; were they changed since?")
            self._consumed += not self._skips.knows(record)
        self._position = (self._epoch, self._consumed)

    def _fingerprint(self) -> dict:
        """What fixes the samples and their order. Names and sizes, not folders: shards may move between machines."""
        listing = json.dumps([[os.path.basename(shard), os.path.getsize(shard)] for shard in self.shards])
        noise = {"noise": json.loads(json.dumps(vars(self.noise)))} if self.noise.probability else {}
        return {"seed": self.seed, "shuffle_buffer": self.shuffle_buffer, "num_shards": len(self.shards),
                "shards": hashlib.sha256(listing.encode("utf-8")).hexdigest(), **noise}
