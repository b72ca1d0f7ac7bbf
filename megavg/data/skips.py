"""Decide what a bad record means: stop the run, or leave the record out, count it and say so once."""

from __future__ import annotations

import logging
from collections import Counter

from megavg.data.sample import RawRecord, SampleError
from megavg.data.urls import TransportError

logger = logging.getLogger(__name__)

WHOLE_SHARD = -1  # stands where a record's index would, for the rest of a torn shard


class SkipLog:
    """Remembers every record that was left out; a record met again in a later epoch is not counted twice.

    Args:
        on_error: "raise" stops at the first bad record; "skip" leaves it out.
        max_skipped: number of skipped records (a torn shard counts as one) that is still accepted.
        counts: a ``Counter`` to fill with the number of skipped records by reason; a new one by default.
        level: logging level of the one line that each skip writes.
    """

    def __init__(self, on_error: str, max_skipped: int, counts: Counter | None = None, level: int = logging.WARNING):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r}: expected 'raise' or 'skip'")
        if max_skipped < 0:
            raise ValueError(f"max_skipped={max_skipped}: expected 0 or more")
        self.on_error, self.max_skipped, self.level = on_error, max_skipped, level
        self.counts = Counter() if counts is None else counts
        self.entries: dict[tuple[str, int], tuple[str, str]] = {}

    @property
    def skipping(self) -> bool:
        """True when bad records are left out instead of ending the run."""
        return self.on_error == "skip"

    def knows(self, record: RawRecord) -> bool:
        """True for a record that was left out before."""
        return (record.shard, record.index) in self.entries

    def restore(self, shard: str, index: int, key: str, reason: str) -> None:
        """Note a record that an earlier process left out, without a log line."""
        if (shard, index) not in self.entries:
            self.entries[shard, index] = (key, reason)
            self.counts[reason] += 1

    def handle(self, error: SampleError, index: int = WHOLE_SHARD) -> None:
        """Count the record ``index`` of ``error.shard`` as skipped.

        Raises:
            SampleError: with ``on_error="raise"``.
            TransportError: always, see there.
            ValueError: when more than ``max_skipped`` records were left out.
        """
        if isinstance(error, TransportError):
            raise error
        if not self.skipping:
            raise SampleError(error.shard, error.key, error.reason,
                              f"{error.detail}; repair it, or set on_error='skip' to leave such records out") from error
        if (error.shard, index) in self.entries:
            return
        self.restore(error.shard, index, error.key, error.reason)
        logger.log(self.level, "skipped: %s", error)
        if len(self.entries) > self.max_skipped:
            raise ValueError(f"{len(self.entries)} records were skipped ({dict(self.counts)}), more than "
                             f"max_skipped={self.max_skipped}; the last was {error}. "
                             "Clean the shards, or raise max_skipped.") from error
