"""Mix several sources by weight into one seeded, resumable order of training samples."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
from collections import Counter

from megavg.data.batches import Agree, BatchSource, SourceOptions
from megavg.data.order import Candidate, Lane
from megavg.data.shards import (SHUFFLE_BYTES, check_fingerprint, expand_shards, order_fingerprint,
                                shards_fingerprint)
from megavg.protocols.options import LabelNoise
from megavg.protocols.sample import Sample

_BLOCK = 1024  # places whose sources are drawn at once


class Mixture(BatchSource):
    """Hand out this rank's share of global batches drawn from several sources; the interface of ``PromptSource``.

    Which source the place p of the global order takes depends on (seed, p) alone: it is drawn with the weights as
    chances, whatever the ranks, the batch size and the records that are left out. Each source runs through epochs of
    its own, in its own order. ``Sample.meta["mixture_source"]`` names it. A mixture has no end.

    Args:
        sources: name -> (paths, patterns or URLs, weight). Weights are relative: 3 and 1 are three samples of four. A
            source may be visited far more often than another, so look at the epochs in ``state_dict``.
        batch_size, seed, dp_rank, dp_size, on_error, max_skipped, noise, agree, num_workers, prefetch_batches: as in
            ``PromptSource``; ``max_skipped`` counts all sources together.
        shuffle_buffer, shuffle_bytes: of each source.

    Attributes:
        samples: ``Counter`` of the samples that were handed out so far by source, over all ranks.
    """

    def __init__(self, sources: dict[str, tuple[str | list[str], float]], batch_size: int, seed: int, dp_rank: int = 0,
                 dp_size: int = 1, shuffle_buffer: int = 1000, on_error: str = "raise", max_skipped: int = 100,
                 noise: LabelNoise = LabelNoise(), *, shuffle_bytes: int = SHUFFLE_BYTES, agree: Agree | None = None,
                 num_workers: int = 0, prefetch_batches: int = 2):
        super().__init__(SourceOptions(batch_size, dp_rank, dp_size, on_error, max_skipped, noise=noise, agree=agree,
                                       num_workers=num_workers, prefetch_batches=prefetch_batches))
        check_weights({name: weight for name, (_, weight) in sources.items()})
        self.names = sorted(sources)  # not as written: the order must not depend on it
        self.seed, self.weights = seed, tuple(float(sources[name][1]) for name in self.names)
        self.samples: Counter = Counter(dict.fromkeys(self.names, 0))
        for name in self.names:
            try:
                shards = expand_shards(sources[name][0])
            except ValueError as error:
                raise ValueError(f"source {name!r}: {error}") from error
            self._lanes.append(Lane(shards, f"{seed}/{name}", shuffle_buffer, shuffle_bytes, self._skips, True))
        every = [shard for lane in self._lanes for shard in lane.shards]
        self._order = order_fingerprint(seed, shuffle_buffer, shuffle_bytes, noise, every)

    def _lane_of(self, place: int) -> int:
        return _block(self.seed, self.weights, place // _BLOCK)[place % _BLOCK]

    def _count(self, lanes: list[int]) -> None:
        self.samples.update(self.names[lane] for lane in lanes)

    def _sample(self, candidate: Candidate, lane: int) -> Sample:
        sample = super()._sample(candidate, lane)
        return dataclasses.replace(sample, meta={**sample.meta, "mixture_source": self.names[lane]})

    def metrics(self) -> dict[str, float]:
        """Skipped records, where there are any, and the samples that each source has given so far."""
        return {**super().metrics(), **{f"data/samples/{name}": self.samples[name] for name in self.names}}

    def state_dict(self) -> dict:
        """The position after the last batch that was handed out, as plain JSON; the same on every rank."""
        sources = {name: {**lane.state(), "samples": self.samples[name]} for name, lane in zip(self.names, self._lanes)}
        return {"place": self._place, "sources": sources, "fingerprint": self._fingerprint()}

    def load_state_dict(self, state: dict) -> None:
        """Continue after the batches that ``state`` had seen, under any ``dp_size``, ``batch_size`` and workers.

        Raises:
            ValueError: when ``state`` belongs to other sources, weights, shards, seed, shuffle buffer or noise.
        """
        check_fingerprint(state["fingerprint"], self._fingerprint())
        for name, lane in zip(self.names, self._lanes):
            lane.load(state["sources"][name])
            self.samples[name] = state["sources"][name]["samples"]
        self._place = state["place"]

    def _fingerprint(self) -> dict:
        parts = {}
        for name, lane, weight in zip(self.names, self._lanes, self.weights):
            parts[f"weight of {name}"] = weight
            parts |= {f"{key} of {name}": value for key, value in shards_fingerprint(lane.shards).items()}
        return {**self._order, **parts}


@functools.lru_cache(maxsize=8)
def _block(seed: int, weights: tuple[float, ...], number: int) -> list[int]:
    """The sources of places ``number * _BLOCK`` and on."""
    rng = random.Random(f"megavg.data.mixture/{seed}/{number}")
    return rng.choices(range(len(weights)), cum_weights=list(itertools.accumulate(weights)), k=_BLOCK)


def check_weights(weights: dict[str, float]) -> None:
    """Raise ``ValueError`` unless there is a source, and every weight is a number above 0."""
    if not weights:
        raise ValueError("a mixture needs at least one source: name -> shards and weight")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ValueError(f"source {name!r}: weight {weight!r} must be a number above 0; leave a source out that is "
                             "not wanted")
