"""Decide before any picture is decoded which samples a shard set will have, so that each shard can be built alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Iterable, NamedTuple

from megavg.data.builder.options import BuildOptions
from megavg.data.readers.base import Draft

UNFIT = "window does not fit"
DUPLICATE = "duplicate"


class Unit(NamedTuple):
    """What becomes one sample: a draft, and which of its windows (0 where none is cut)."""

    draft: Draft
    turn: int


@dataclass
class Plan:
    """The numbered samples of a set, cut into shards by their numbers.

    Attributes:
        shards: the units of each shard; what is known to be left out is missing from them.
        left_out: one row for each draft or sample that is left out: "reason", "key", "where", "image", "detail".
        duplicates: pairs of keys (earlier, later) of samples that are the same.
        fingerprint: of the source and of everything that changes the bytes.
    """

    options: BuildOptions
    shards: list[list[Unit]]
    left_out: list[dict[str, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    fingerprint: str = ""

    @property
    def num_units(self) -> int:
        """Samples that will be tried."""
        return sum(map(len, self.shards))

    def summary(self) -> dict[str, Any]:
        """What tells one build from another, for a person who has to see why they differ."""
        ends = [self.shards[0][0].draft.key, self.shards[-1][-1].draft.key]
        return {"fingerprint": self.fingerprint, "num_samples": self.num_units, "first_and_last": ends,
                **self.options.identity()}


def make_plan(drafts: Iterable[Draft], options: BuildOptions) -> Plan:
    """Number the samples of ``drafts``: shard k gets numbers k N to (k + 1) N, N = ``options.samples_per_shard``.

    Raises:
        ValueError: no draft, no draft that fits, or a key that occurs twice, with both places.
    """
    units: list[Unit] = []
    left_out: list[dict[str, str]] = []
    places: dict[str, str] = {}
    for draft in drafts:
        if draft.key in places:
            raise ValueError(f"the key {draft.key!r} occurs twice: {places[draft.key]} and {draft.where}; every "
                             "sample needs a key of its own")
        places[draft.key] = draft.where
        why = options.why_unfit(draft)
        if why is not None:
            left_out.append(row(draft, UNFIT, why))
            continue
        units += [Unit(draft, turn) for turn in range(options.crops_per_sample if options.crop else 1)]
        if options.limit and len(units) >= options.limit:
            del units[options.limit:]
            break
    if not units:
        unfit = f"; {len(left_out)} were left out because the window of crop does not fit" if left_out else ""
        raise ValueError(f"no sample to write{unfit}; check the source and its filters")
    size = options.samples_per_shard
    shards = [units[start:start + size] for start in range(0, len(units), size)]
    return Plan(options, shards, left_out, fingerprint=_fingerprint(units, options))


def row(draft: Draft, reason: str, detail: str, key: str | None = None) -> dict[str, str]:
    """One line of the report of what was left out."""
    return {"reason": reason, "key": key or draft.key, "where": draft.where,
            "image": "" if draft.image is None else str(draft.image), "detail": detail}


def _fingerprint(units: list[Unit], options: BuildOptions) -> str:
    """A checksum of keys, fields, names of pictures and options; the pictures themselves are not looked into."""
    digest = hashlib.sha256(json.dumps(options.identity(), sort_keys=True).encode())
    for draft, turn in units:
        # Everything a draft holds but "where", which only messages need.
        rest = {name: value for name, value in vars(draft).items() if name not in ("where", "key", "image")}
        facts = [draft.key, turn, str(draft.image), rest]
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def drop(plan: Plan, duplicates: list[tuple[Draft, Draft]]) -> None:
    """Enter ``duplicates`` (earlier draft, later draft) into the plan and treat them as its options say.

    Raises:
        ValueError: with ``on_duplicate="raise"``, naming the first pair and the number of pairs.
    """
    plan.duplicates = [(earlier.key, later.key) for earlier, later in duplicates]
    if not duplicates or plan.options.on_duplicate == "keep":
        return
    earlier, later = duplicates[0]
    if plan.options.on_duplicate == "raise":
        raise ValueError(f"{len(duplicates)} samples are the same as earlier ones (bytes of the picture, question, "
                         f"answer); the first is {later.key!r} ({later.where}), the same as {earlier.key!r} "
                         f"({earlier.where}); set on_duplicate to skip or keep")
    gone = {later.key for _, later in duplicates}
    plan.shards = [[unit for unit in units if unit.draft.key not in gone] for units in plan.shards]
    plan.left_out += [row(later, DUPLICATE, f"the same picture, question and answer as {earlier.key!r}")
                      for earlier, later in duplicates]
