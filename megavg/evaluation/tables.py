"""Break figures down by what the samples say of themselves, and lay them out as Markdown: RefCOCO, ScreenSpot, any."""

from __future__ import annotations

import math
from typing import Mapping, Sequence

from megavg.evaluation.figures import HEADLINES, figures, headline

REFCOCO_SPLITS = (("refcoco", "val"), ("refcoco", "testA"), ("refcoco", "testB"), ("refcoco+", "val"),
                  ("refcoco+", "testA"), ("refcoco+", "testB"), ("refcocog", "val"), ("refcocog", "test"))
"""The eight official evaluation splits: UNC's of RefCOCO and RefCOCO+, UMD's of RefCOCOg."""
_PARTITION = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}

# in the order in which they are tried: ScreenSpot-Pro's records say all that those of ScreenSpot say
_GROUPED_BY = {"refcoco": ("dataset", "split"), "screenspot_pro": ("group", "data_type"),
               "screenspot": ("platform", "data_type"), "detection": (), "classification": ()}
_TASK = {"refcoco": "rec", "screenspot": "point", "screenspot_pro": "point", "detection": "detection",
         "classification": "classification"}
BENCHMARKS = tuple(_GROUPED_BY)
"""Names of the ways to break a set down that papers use."""


def benchmark_of(rows: Sequence[dict], wanted: str = "auto") -> str | None:
    """The benchmark that the rows belong to by task and meta, or None for a plain set.

    Raises:
        ValueError: ``wanted`` is a benchmark's name and a row has another task, or lacks the meta it is broken down by.
    """
    for name in BENCHMARKS if wanted == "auto" else (wanted,):
        unfit = next((row for row in rows if row["task"] != _TASK[name] or not set(_GROUPED_BY[name]) <= set(
            row["meta"])), None)
        if unfit is None:
            return name
        if wanted != "auto":
            raise ValueError(f"benchmark: {name} takes samples of task {_TASK[name]!r} whose records say "
                             f"{' and '.join(_GROUPED_BY[name]) or 'nothing more'}, but {unfit['key']!r} of "
                             f"{unfit['shard']!r} has task {unfit['task']!r} and says {sorted(unfit['meta'])}; set "
                             "benchmark: auto, or build the shards with the reader of that format")
    return None


def breakdown(rows: Sequence[dict], fields: Sequence[str]) -> list[dict]:
    """The figures of each group of rows that agree in ``fields`` of their meta, sorted; "-" stands for none.

    Each entry holds the fields and what :func:`megavg.evaluation.figures.figures` gives.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row["meta"].get(field, "-")) for field in fields), []).append(row)
    return [{**dict(zip(fields, values)), **figures(groups[values])} for values in sorted(groups)]


def screenspot(rows: Sequence[dict], across: str = "platform", down: str = "data_type") -> dict:
    """ScreenSpot's table: accuracy of each platform and kind of target, and the two averages that papers print.

    Returns:
        cells: [{platform, data_type, accuracy, num_samples}, ...]; platforms: the same of each platform over its
        kinds; micro: accuracy over all samples; macro: mean of the cells, each counting the same. Both are called
        "average" in the literature, and they differ by some points, as the cells differ in size.
    """
    cells = [_cell(part, (across, down)) for part in breakdown(rows, (across, down))]
    return {"cells": cells, "platforms": [_cell(part, (across,)) for part in breakdown(rows, (across,))],
            "micro": sum(row["correct"] for row in rows) / len(rows),
            "macro": math.fsum(cell["accuracy"] for cell in cells) / len(cells)}


def _cell(part: dict, fields: Sequence[str]) -> dict:
    return {name: part[name] for name in (*fields, "accuracy", "num_samples")}


def benchmark_tables(rows: Sequence[dict], benchmark: str | None, group_by: Sequence[str]) -> dict:
    """What a set's result holds beside its figures: ``groups``, and ``screenspot`` where it applies."""
    fields = tuple(group_by) or _GROUPED_BY.get(benchmark, ())
    if benchmark == "refcoco" and not group_by and any(row["meta"].get("split_by") for row in rows):
        fields = ("dataset", "split_by", "split")  # val of google's partition is another set than val of UNC's
    tables: dict = {"groups": breakdown(rows, fields), "group_by": list(fields)} if fields else {}
    if benchmark in ("screenspot", "screenspot_pro"):
        tables["screenspot"] = screenspot(rows, _GROUPED_BY[benchmark][0])
    return tables


def refcoco_columns(rows_of_set: Mapping[str, Sequence[dict]]) -> dict[tuple[str, str], dict]:
    """Figures of each official split that some set of a run holds, in the official order.

    Rows of different sets that belong to one split count together, each sample once.
    """
    found: dict[tuple[str, str], dict] = {}
    for rows in rows_of_set.values():
        for row in rows:
            split = _official_split(row["meta"])
            if row["task"] == "rec" and split in REFCOCO_SPLITS:
                found.setdefault(split, {}).setdefault((row["shard"], row["key"]), row)
    return {split: figures(list(found[split].values())) for split in REFCOCO_SPLITS if split in found}


def refcoco_left_out(rows_of_set: Mapping[str, Sequence[dict]]) -> dict[str, int]:
    """How many samples of RefCOCO, + or g of a run belong to no official split, by what they are; each counts once.

    Those are training samples, Google's partitions, and records whose names are written in another way.
    """
    names: dict[str, set] = {}
    for rows in rows_of_set.values():
        for row in rows:
            split = _official_split(row["meta"])
            if row["task"] == "rec" and split[0].startswith("refcoco") and split not in REFCOCO_SPLITS:
                names.setdefault(" ".join(split), set()).add((row["shard"], row["key"]))
    return {name: len(names[name]) for name in sorted(names)}


def _official_split(meta: Mapping) -> tuple[str, str]:
    """(dataset, split) of a record as REFCOCO_SPLITS writes them; those of another partition are none of them."""
    name = str(meta.get("dataset", "")).lower().replace("_", "").replace("-", "").replace("plus", "+")
    partition = meta.get("split_by") or ""
    return (name if partition in ("", _PARTITION.get(name)) else f"{name} by {partition}",
            str(meta.get("split") or "without a split"))


def refcoco_markdown(columns: Mapping[tuple[str, str], dict]) -> str:
    """The official table: one column for each split, and the mean of all eight where all are there."""
    lines = []
    for key, name in (("acc_at_50", "Acc@0.5 (IoU > 0.5)"), ("acc_at_50_inclusive", "Acc@0.5 (IoU >= 0.5)"),
                      ("mean_iou", "mean IoU"), ("parse_rate", "parsed")):
        values = [columns[split][key] if split in columns else None for split in REFCOCO_SPLITS]
        mean = None if None in values else math.fsum(values) / len(values)
        lines.append([name, *map(percent, values), percent(mean)])
    lines.append(["samples", *(str(columns[split]["num_samples"]) if split in columns else "-"
                               for split in REFCOCO_SPLITS), "-"])
    return markdown(["", *(" ".join(split) for split in REFCOCO_SPLITS), "mean of 8"], lines)


def screenspot_markdown(table: dict) -> str:
    """ScreenSpot's table: a row for each platform, a column for each kind of target."""
    across, down, *_ = table["cells"][0]
    kinds = sorted({cell[down] for cell in table["cells"]}, reverse=True)  # text before icon, as papers have it
    of = {(cell[across], cell[down]): cell for cell in table["cells"]}
    lines = []
    for platform in table["platforms"]:
        cells = [of.get((platform[across], kind)) for kind in kinds]
        lines.append([platform[across], *(f"{percent(cell['accuracy'])} ({cell['num_samples']})" if cell else "-"
                                          for cell in cells), f"{percent(platform['accuracy'])}"])
    text = markdown([across, *kinds, "all"], lines)
    return (f"{text}\n\nMicro average (over samples) {percent(table['micro'])}; macro average (over the "
            f"{len(table['cells'])} cells) {percent(table['macro'])}.")


def groups_markdown(groups: Sequence[dict], fields: Sequence[str]) -> str:
    """One row for each group with its headline, parse rate and size."""
    names = list(dict.fromkeys(HEADLINES[group["task"]][1] for group in groups))
    lines = []
    for group in groups:
        name, value = headline(group)
        lines.append([*(group[field] for field in fields), *(percent(value) if name == own else "-" for own in names),
                      percent(group["parse_rate"]), str(group["num_samples"])])
    return markdown([*fields, *names, "parsed", "samples"], lines)


def percent(value: float | None) -> str:
    """A share as per cent with one decimal; "-" for none."""
    return "-" if value is None else f"{100 * value:.1f}"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers, aligned to the right."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in (header, *lines)]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(header))]

    def row(line: Sequence[str]) -> str:
        return "| " + " | ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(
            line[1:], widths[1:]))]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([row(cells[0]), rule, *map(row, cells[1:])])
