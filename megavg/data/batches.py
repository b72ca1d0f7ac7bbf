"""Cut the global order of one or several sources into global batches, and decode this rank's share of each.

The order is GLOBAL: every data-parallel rank walks through the same records, of which it knows little more than the
names, and reads and decodes its own. The sample at place k of a global batch belongs to rank k % dp_size.
"""

from __future__ import annotations

import abc
import dataclasses
import logging
from collections import Counter
from typing import Callable, Iterator

from megavg.data.decode import decode_record
from megavg.data.noise import add_noise
from megavg.data.order import Candidate, Lane
from megavg.data.prefetch import DecodePool, result
from megavg.data.sample import SampleError
from megavg.data.skips import SkipLog
from megavg.protocols.options import LabelNoise
from megavg.protocols.sample import Sample

Agree = Callable[[list], list]
"""Joins the lists of small plain values of all data-parallel ranks, in rank order, on every rank."""

_FAILED = -1


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """What sources of training batches have in common; ``PromptSource`` describes each."""

    batch_size: int
    dp_rank: int = 0
    dp_size: int = 1
    on_error: str = "raise"
    max_skipped: int = 100
    infinite: bool = True
    drop_last: bool = False
    noise: LabelNoise = LabelNoise()
    agree: Agree | None = None
    num_workers: int = 0
    prefetch_batches: int = 2

    def __post_init__(self):
        if self.dp_size < 1 or not 0 <= self.dp_rank < self.dp_size:
            raise ValueError(f"dp_rank={self.dp_rank} is not a rank of dp_size={self.dp_size}")
        if self.batch_size < 1 or self.batch_size % self.dp_size:
            raise ValueError(f"batch_size={self.batch_size} is not a positive multiple of the data-parallel size "
                             f"{self.dp_size}; change the batch size or the number of ranks")
        if self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers}: expected 0 (decode in this process) or more")
        if self.prefetch_batches < 1:
            raise ValueError(f"prefetch_batches={self.prefetch_batches}: expected at least 1; num_workers=0 decodes "
                             "nothing ahead")


class _Choice:
    """The candidates of one lane that have been looked at for a batch: ``good`` are the places of those to hand out."""

    def __init__(self, lane: Lane, places: list[int], skips: SkipLog):
        self.lane, self.places, self._skips = lane, places, skips
        self.number, self.good = 0, []

    def next(self) -> Candidate | None:
        """The next candidate that is not known to be bad, or None at the end of a finite source."""
        while True:
            candidate = self.lane.at(self.number)
            for error in candidate.met:
                self._skips.handle(error)
            if candidate.failure is not None:
                raise candidate.failure
            if candidate.record is None:
                if self.lane.infinite:
                    raise self.lane.nothing_usable()
                return None
            self.number += 1
            if not self._skips.knows(candidate.record):
                return candidate

    def draw(self) -> Iterator[tuple[int, Candidate, int]]:
        """(number, candidate, place in the batch) for the places that have no good candidate yet."""
        for place in self.places[len(self.good):]:
            candidate = self.next()
            if candidate is None:
                return
            yield self.number - 1, candidate, place


class BatchSource(abc.ABC):
    """Hand out this rank's share of global batches whose every place takes the next sample of one of several lanes.

    Subclasses say which lane a place of the global order takes (``_lane_of``), and save and restore the position.
    Usable as a context manager, which ends the worker processes.

    Attributes:
        skipped: ``Counter`` of skipped records by reason, equal on every rank; a record counts once, not every epoch.
    """

    def __init__(self, options: SourceOptions):
        self.options = options
        # all ranks skip alike, so one of them is enough to say it
        self._skips = SkipLog(options.on_error, options.max_skipped,
                              level=logging.WARNING if options.dp_rank == 0 else logging.DEBUG)
        self.skipped: Counter = self._skips.counts
        self._agree = options.agree if self._skips.skipping else None
        self._lanes: list[Lane] = []
        self._place = 0  # samples handed out so far, over all ranks
        self._pool: DecodePool | None = None
        self._closed = False

    @abc.abstractmethod
    def _lane_of(self, place: int) -> int:
        """Number of the lane that ``place`` of the global order takes."""

    @abc.abstractmethod
    def state_dict(self) -> dict:
        """The position after the last batch that was handed out, as plain JSON; the same on every rank."""

    @abc.abstractmethod
    def load_state_dict(self, state: dict) -> None:
        """Continue after the batches that ``state`` had seen; ValueError where it belongs to another order."""

    def next_batch(self) -> list[Sample]:
        """Return the samples that this rank owns of the next global batch: ``batch_size / dp_size`` of them.

        Raises:
            StopIteration: of a finite source, after its last batch. That one may be shorter and, on some ranks, empty.
            SampleError: a bad record of this rank, or a torn shard, with ``on_error="raise"``.
            ValueError: more than ``max_skipped`` bad records, an epoch without one usable sample, a worker that has
                died (``WorkerError``), or a closed source.
        """
        if self._closed:
            raise ValueError("this source of batches was closed; make a new one and load the position into it")
        self._look_ahead(1 + self.options.prefetch_batches)
        lanes = [self._lane_of(self._place + place) for place in range(self.options.batch_size)]
        choices = [_Choice(lane, [place for place, taken in enumerate(lanes) if taken == number], self._skips)
                   for number, lane in enumerate(self._lanes)]
        chosen = self._choose(choices)
        if not chosen or self.options.drop_last and len(chosen) < self.options.batch_size:
            raise StopIteration
        batch = [self._sample(chosen[place], lanes[place])
                 for place in range(self.options.dp_rank, len(chosen), self.options.dp_size)]
        for choice in choices:
            choice.lane.take(choice.number, set(choice.good))
        self._place += len(chosen)
        self._count(lanes[:len(chosen)])
        self._look_ahead(self.options.prefetch_batches)
        return batch

    def __iter__(self) -> BatchSource:
        return self

    __next__, __enter__ = next_batch, __iter__

    def _choose(self, choices: list[_Choice]) -> list[Candidate]:
        """The candidates at the places of the batch, in rounds: the places of those found bad are filled by the next.

        Every rank makes the same rounds; with ``agree`` it tells the others of its bad ones and of its failures.
        """
        chosen: dict[int, Candidate] = {}
        while any(len(choice.good) < len(choice.places) for choice in choices):
            drawn, bad, failure = [], [], None
            try:
                drawn = [(choice, *found) for choice in choices for found in choice.draw()]
                bad = self._find_bad(drawn) if self._skips.skipping else []
            except (ValueError, OSError) as error:
                if self._agree is None:
                    raise
                failure, bad = error, [(_FAILED, str(error))]
            if self._agree is not None:
                bad = self._told(bad, failure)
            if not drawn:
                break  # the end of a finite source
            errors = {number: SampleError(drawn[number][2].record.shard, *why) for number, *why in sorted(bad)}
            for number, (choice, at, candidate, _) in enumerate(drawn):
                if number in errors:
                    self._skips.handle(errors[number], candidate.record.index)
                else:
                    chosen[choice.places[len(choice.good)]] = candidate
                    choice.good.append(at)
        return [chosen[place] for place in sorted(chosen)]

    def _find_bad(self, drawn: list[tuple]) -> list[tuple]:
        """(number in ``drawn``, key, reason, detail) of those that give no sample, among those this rank looks at."""
        bad = []
        for number, (_, _, candidate, place) in enumerate(drawn):
            if not self._looks_at(place):
                continue
            found = self._outcome(candidate)
            if isinstance(found, SampleError):
                bad.append((number, found.key, found.reason, found.detail))
            elif place % self.options.dp_size != self.options.dp_rank:
                candidate.job = candidate.outcome = None  # its owner keeps the picture
        return bad

    def _told(self, bad: list[tuple], failure: Exception | None) -> list[tuple]:
        told = self._agree(bad)
        if failure is not None:
            raise failure
        for number, *why in told:
            if number == _FAILED:
                raise ValueError(why[0])
        return told

    def _looks_at(self, place: int) -> bool:
        """Whether this rank decodes what stands at ``place``: its own, or all where no one tells it of the others'."""
        mine = place % self.options.dp_size == self.options.dp_rank
        return mine or self._skips.skipping and self._agree is None

    def _outcome(self, candidate: Candidate) -> Sample | SampleError:
        if candidate.outcome is None:
            try:
                found = result(candidate.job, candidate.record) if candidate.job else decode_record(candidate.record)
                candidate.outcome = add_noise(found, self.options.noise) if isinstance(found, Sample) else found
            except SampleError as error:
                candidate.outcome = error
        return candidate.outcome

    def _sample(self, candidate: Candidate, lane: int) -> Sample:
        found = self._outcome(candidate)
        if isinstance(found, SampleError):
            if not self._skips.skipping:
                self._skips.handle(found, candidate.record.index)  # raises with the remedy
            raise found  # the rank that looked at it before could decode it
        return found

    def _look_ahead(self, num_batches: int) -> None:
        """Give the workers what this rank will need of the next batches, as far as is known by now."""
        if not self.options.num_workers:
            return
        if self._pool is None:
            self._pool = DecodePool(self.options.num_workers)
        drawn = [0] * len(self._lanes)
        for place in range(num_batches * self.options.batch_size):
            lane = self._lane_of(self._place + place)
            candidate = self._lanes[lane].at(drawn[lane])
            drawn[lane] += 1
            if candidate.record is not None and candidate.job is None and candidate.outcome is None \
                    and self._looks_at(place % self.options.batch_size):
                candidate.job = self._pool.submit(candidate.record)

    def _count(self, lanes: list[int]) -> None:
        """Note the lanes of the samples that were handed out."""

    def metrics(self) -> dict[str, float]:
        """Figures for the log, equal on every rank: skipped records, where there are any."""
        return {"data/skipped": sum(self.skipped.values())} if self.skipped else {}

    def close(self) -> None:
        """End the worker processes and let go of open shards; may be called twice. The position can still be saved."""
        self._closed = True
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        for lane in self._lanes:
            lane.close()

    def __exit__(self, *_) -> None:
        self.close()
