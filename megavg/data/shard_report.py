"""Put the facts of many shards together: totals, box statistics, and everything that is wrong with the set."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any, Iterable, Sequence

from megavg.data.builder.folder import UNFINISHED
from megavg.data.shard_facts import HEAT_CELLS, Seen, ShardFacts
from megavg.data.writer import INDEX_NAME

_NUM_FIRST = 5
_NUM_LABELS = 100
_QUANTILES = {"min": 0.0, "1%": 0.01, "10%": 0.1, "25%": 0.25, "50%": 0.5, "75%": 0.75, "90%": 0.9, "99%": 0.99,
              "max": 1.0}


def problem(kind: str, shard: str, key: str, detail: str) -> dict[str, str]:
    """One thing that is wrong, as the report lists it."""
    return {"kind": kind, "shard": shard, "key": key, "detail": detail}


def describe(facts: Sequence[ShardFacts]) -> dict[str, Any]:
    """Counts, sizes and box statistics of a set, as plain JSON."""
    def summed(name: str) -> Counter:
        return sum((getattr(fact, name) for fact in facts), Counter())

    sizes = summed("sizes")
    return {
        "num_shards": len(facts), "num_samples": sum(fact.num_samples for fact in facts),
        "bytes": sum(fact.num_bytes for fact in facts),
        "tasks": _most_frequent(summed("tasks")), "splits": _most_frequent(summed("splits")),
        "labels": _most_frequent(summed("labels")),
        "pictures": {"distinct": len({seen.picture for fact in facts for seen in fact.seen}),
                     "formats": _most_frequent(summed("picture_formats")),
                     "width_px": _quantiles(_repeated(sizes, 0)), "height_px": _quantiles(_repeated(sizes, 1))},
        "boxes": _boxes(facts, summed("boxes_per_sample")),
    }


def _boxes(facts: Sequence[ShardFacts], per_sample: Counter) -> dict[str, Any]:
    def pooled(name: str) -> list[float]:
        return [value for fact in facts for value in getattr(fact, name)]

    heat = [sum(cells) for cells in zip(*(fact.heat for fact in facts))] or [0] * HEAT_CELLS**2
    return {"count": sum(heat), "per_sample": {str(number): per_sample[number] for number in sorted(per_sample)},
            "area_share": _quantiles(pooled("area_shares")), "aspect": _quantiles(pooled("aspects")),
            "short_side_px": _quantiles(pooled("short_sides_px")),
            "centres": [heat[row * HEAT_CELLS:(row + 1) * HEAT_CELLS] for row in range(HEAT_CELLS)]}


def _repeated(sizes: Counter, axis: int) -> list[int]:
    return [size[axis] for size, count in sizes.items() for _ in range(count)]


def _quantiles(values: Iterable[float]) -> dict[str, float]:
    """The smallest value that so large a part of all values does not exceed; empty for no value."""
    ordered = sorted(values)
    return {name: ordered[min(int(part * len(ordered)), len(ordered) - 1)]
            for name, part in _QUANTILES.items()} if ordered else {}


def _most_frequent(counts: Counter) -> dict[str, int]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], str(item[0])))
    others = sum(count for _, count in ordered[_NUM_LABELS:])
    return {str(name): count for name, count in ordered[:_NUM_LABELS]} | ({"others": others} if others else {})


def record_problems(facts: Iterable[ShardFacts]) -> list[dict[str, str]]:
    """Records that cannot be used, with one line for those of a shard beyond the first 1000."""
    found = []
    for fact in facts:
        found += [problem(reason, fact.path, key, detail) for reason, key, detail in fact.problems]
        beyond = sum(fact.num_problems.values()) - len(fact.problems)
        if beyond:
            found.append(problem("more bad records", fact.path, "", f"{beyond} more; by reason: "
                                 f"{dict(fact.num_problems)}"))
    return found


def index_problems(facts: Iterable[ShardFacts], whole_folders: Iterable[str] = ()) -> list[dict[str, str]]:
    """Compare shards with the index.json beside them.

    Args:
        whole_folders: folders that were checked as a whole: every shard of their index, and the index, must be there.
    """
    found: list[dict[str, str]] = []
    by_folder: dict[str, list[ShardFacts]] = {os.path.normpath(folder): [] for folder in whole_folders}
    whole = set(by_folder)
    for fact in facts:
        by_folder.setdefault(os.path.normpath(os.path.dirname(fact.path)), []).append(fact)
    for folder, held in by_folder.items():
        path = os.path.join(folder, INDEX_NAME)
        if os.path.isdir(os.path.join(folder, UNFINISHED)):
            found.append(problem("unfinished build", folder, "", f"{UNFINISHED} stands in the folder; run the same "
                                 "make_shards command again to complete the set"))
        if not os.path.exists(path):
            if folder in whole and not os.path.isdir(os.path.join(folder, UNFINISHED)):
                found.append(problem("no index", folder, "", f"no {INDEX_NAME}: the set is not complete, or was made "
                                     "elsewhere; counts and checksums unchecked"))
            continue
        try:
            with open(path, encoding="utf-8") as file:
                listed = {entry["name"]: entry for entry in json.load(file)["shards"]}
                found += _differences(folder, held, listed, folder in whole)
        except (OSError, ValueError, KeyError, TypeError) as error:
            found.append(problem("bad index", path, "", f"it does not read as an index of shards "
                                 f"({type(error).__name__}: {error})"))
    return found


def without_index(facts: Iterable[ShardFacts], whole_folders: Iterable[str] = ()) -> list[str]:
    """Folders without an index of which only some shards were checked, which is no fault."""
    held = dict.fromkeys(os.path.normpath(os.path.dirname(fact.path)) for fact in facts)
    whole = {os.path.normpath(folder) for folder in whole_folders}
    return [folder for folder in held if folder not in whole and not os.path.exists(os.path.join(folder, INDEX_NAME))]


def _differences(folder: str, held: list[ShardFacts], listed: dict[str, dict], whole: bool) -> list[dict[str, str]]:
    found = []
    for fact in held:
        entry = listed.get(os.path.basename(fact.path))
        if entry is None:
            found.append(problem("not in the index", fact.path, "", f"a reader of the folder takes it, {INDEX_NAME} "
                                 "does not know it; remove it or build the set again"))
            continue
        for name, value in (("bytes", fact.num_bytes), ("sha256", fact.sha256)):
            if entry[name] != value:
                found.append(problem("checksum", fact.path, "", f"{name} is {value}, the index says {entry[name]}; "
                                     "copy or build the shard again"))
        if entry["num_samples"] != fact.num_samples:
            found.append(problem("count", fact.path, "", f"{fact.num_samples} usable samples, the index says "
                                 f"{entry['num_samples']}"))
    if whole:
        names = {os.path.basename(fact.path) for fact in held}
        found += [problem("missing shard", os.path.join(folder, name), "", "the index lists it, the folder lacks it")
                  for name in listed if name not in names]
    return found


def repeated(facts: Sequence[ShardFacts]) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Keys and pictures that occur where they may not, and samples that are the same.

    Returns:
        Problems (a key twice; a picture in two splits), and the samples with the same picture, question and answer as
        an earlier one, which are reported but not wrong: {"count", "first": pairs of keys}.
    """
    places: dict[str, str] = {}
    questions: dict[bytes, str] = {}
    splits: dict[bytes, Seen] = {}
    problems, same, told = [], [], set()
    for fact in facts:
        for seen in fact.seen:
            if seen.key in places:
                problems.append(problem("duplicate key", fact.path, seen.key, f"also in {places[seen.key]}"))
            places.setdefault(seen.key, fact.path)
            earlier = questions.setdefault(seen.picture + seen.question, seen.key)
            if earlier is not seen.key:
                same.append((earlier, seen.key))
            first = splits.setdefault(seen.picture, seen)
            if first.split != seen.split and (seen.picture, seen.split) not in told:
                told.add((seen.picture, seen.split))
                problems.append(problem("picture in two splits", fact.path, seen.key,
                                        f"split {seen.split!r}; {first.key!r} has it in split {first.split!r}"))
    return problems, {"count": len(same), "first": [list(pair) for pair in same[:_NUM_FIRST]]}


def leaks(facts: Sequence[ShardFacts], others: Sequence[ShardFacts]) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Pictures that both sets hold: one problem for each, and how many pictures and samples of ``facts`` they are."""
    theirs = {seen.picture: (seen.key, fact.path) for fact in others for seen in fact.seen}
    problems, told, num_samples = [], set(), 0
    for fact in facts:
        for seen in fact.seen:
            if seen.picture not in theirs:
                continue
            num_samples += 1
            if seen.picture not in told:
                told.add(seen.picture)
                key, path = theirs[seen.picture]
                problems.append(problem("leak", fact.path, seen.key, f"the same picture as {key!r} of {path}"))
    return problems, {"pictures": len(told), "samples": num_samples}
