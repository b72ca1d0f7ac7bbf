"""The seeded order of one source's records, epoch after epoch, and a queue of those that were drawn but not handed out.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Iterable, Iterator

from megavg.data.sample import RawRecord, SampleError
from megavg.data.skips import SkipLog
from megavg.data.tars import walk_shards


@dataclass
class Candidate:
    """A record that was drawn for a place of the global order, and what has become of it.

    Attributes:
        record: None where the source has ended, see ``failure``.
        epoch: it was drawn in.
        met: torn shards that were met since the candidate before; they are handled when this one's turn comes, so that
            what a saved position holds does not depend on how far ahead was drawn.
        failure: raised at this place. None for the end of a finite source, or after a whole epoch of an infinite one
            without a record that can be used.
        job: of the worker that decodes it, if one does.
        outcome: the decoded sample, or why there is none.
    """

    record: RawRecord | None
    epoch: int
    met: list[SampleError] = field(default_factory=list)
    failure: Exception | None = None
    job: Any = None
    outcome: Any = None


def shuffled(records: Iterable, buffer_size: int, rng: random.Random, max_bytes: int = 0) -> Iterator:
    """Shuffle a stream through a buffer of at most ``buffer_size`` records; 1 keeps the order.

    With ``max_bytes`` the buffer gives records away while it holds more bytes than that and more than one record;
    members that lie in files count nothing. Errors in the stream pass at once.
    """
    buffer: list = []
    held = 0

    def pick():
        place = rng.randrange(len(buffer))
        buffer[place], buffer[-1] = buffer[-1], buffer[place]
        return buffer.pop()

    for record in records:
        if isinstance(record, SampleError):
            yield record
            continue
        buffer.append(record)
        held += bytes_held(record) if max_bytes else 0
        while len(buffer) == buffer_size or max_bytes and held > max_bytes and len(buffer) > 1:
            record = pick()
            held -= bytes_held(record) if max_bytes else 0
            yield record
    while buffer:
        yield pick()


def bytes_held(record: RawRecord) -> int:
    """How many bytes of members ``record`` holds in memory."""
    return sum(len(member) for member in record.files.values() if isinstance(member, bytes))


class Lane:
    """The records of one source in their global order, drawn ahead as far as asked for.

    Args:
        shards: paths and URLs.
        seed: of the order; epoch e shuffles the shards, then the records through the buffer, seeded by (seed, e).
        shuffle_buffer, shuffle_bytes: bounds of the buffer, in records and in bytes that are held in memory.
        skips: which records are left out.
        infinite: False ends after one epoch.

    Attributes:
        position: (epoch, usable records of it that were handed out).
    """

    def __init__(self, shards: list[str], seed: int | str, shuffle_buffer: int, shuffle_bytes: int, skips: SkipLog,
                 infinite: bool):
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer={shuffle_buffer}: expected at least 1 (no shuffling inside a shard)")
        if shuffle_bytes < 0:
            raise ValueError(f"shuffle_bytes={shuffle_bytes}: expected 0 (no bound) or more")
        self.shards, self.seed, self.infinite, self._skips = shards, seed, infinite, skips
        self._buffer = shuffle_buffer, shuffle_bytes
        self.position = (0, 0)
        self._queue: deque[Candidate] = deque()
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        rng = random.Random(f"megavg.data.shards/{self.seed}/{epoch}")
        order = list(self.shards)
        rng.shuffle(order)
        self._epoch, self._num_drawn, self._last = epoch, 0, None
        self._items = shuffled(walk_shards(order), self._buffer[0], rng, self._buffer[1])

    def at(self, number: int) -> Candidate:
        """The candidate after ``number`` others that have not been handed out; the end of the source stays its last."""
        while len(self._queue) <= number:
            if self._last is not None:
                return self._last
            candidate = self._draw()
            if candidate.record is None:
                self._last = candidate
            else:
                self._queue.append(candidate)
        return self._queue[number]

    def _draw(self) -> Candidate:
        met: list[SampleError] = []
        try:
            while True:
                item = next(self._items, None)
                if isinstance(item, SampleError):
                    met.append(item)
                elif item is not None:
                    if not self._skips.knows(item):
                        self._num_drawn += 1
                        return Candidate(item, self._epoch, met)
                elif not self.infinite or not self._num_drawn:
                    return Candidate(None, self._epoch, met)
                else:
                    self._begin(self._epoch + 1)
        except (ValueError, OSError) as error:  # belongs to a later batch, perhaps
            return Candidate(None, self._epoch, met, error)

    def nothing_usable(self) -> ValueError:
        """What to raise where an infinite source has no record that can be used."""
        return ValueError(f"no usable sample in {len(self.shards)} shards starting with {self.shards[0]!r}; skipped: "
                          f"{dict(self._skips.counts)}")

    def take(self, number: int, good: set[int]) -> None:
        """Hand out the next ``number`` candidates: those at the places ``good`` count, the others were left out."""
        for place in range(number):
            candidate = self._queue.popleft()
            epoch, consumed = self.position
            consumed = consumed if epoch == candidate.epoch else 0
            self.position = candidate.epoch, consumed + (place in good)

    def state(self) -> dict:
        """The position and the records that were left out, as plain JSON."""
        number_of = {shard: number for number, shard in enumerate(self.shards)}
        skipped = sorted([number_of[shard], index, key, reason]
                         for (shard, index), (key, reason) in self._skips.entries.items() if shard in number_of)
        return {"epoch": self.position[0], "consumed": self.position[1], "skipped": skipped}

    def load(self, state: dict) -> None:
        """Go on where ``state`` was taken; no member of a local tar is read for it.

        Raises:
            ValueError: the shards hold fewer samples than had been handed out.
        """
        for number, index, key, reason in state["skipped"]:
            self._skips.restore(self.shards[number], index, key, reason)
        self._queue.clear()
        self._begin(state["epoch"])
        while self._num_drawn < state["consumed"]:
            item = next(self._items, None)
            if item is None:
                raise ValueError(f"the shards end after {self._num_drawn} of {state['consumed']} samples that the "
                                 "saved position had consumed in this epoch; were they changed since?")
            if isinstance(item, SampleError):
                self._skips.handle(item)
            else:
                self._num_drawn += not self._skips.knows(item)
        self.position = (state["epoch"], state["consumed"])

    def close(self) -> None:
        """Let go of what is open; drawing on ends here."""
        self._queue.clear()
        self._items = iter(())
