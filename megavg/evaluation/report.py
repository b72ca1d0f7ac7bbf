"""Write what an evaluation found: results.json, results.md, the rows of each set and its worst cases."""

from __future__ import annotations

import json
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from megavg.evaluation.figures import headline
from megavg.evaluation.fingerprint import write_beside
from megavg.evaluation.tables import (groups_markdown, markdown, percent, refcoco_columns, refcoco_left_out,
                                      refcoco_markdown, screenspot_markdown)
from megavg.evaluation.worst import worst_panel, worst_rows

_PACKAGES = ("torch", "transformers", "deepspeed", "megatron-core", "pycocotools", "webdataset", "pillow")


def versions() -> dict[str, str]:
    """Version of megavg, Python and each library that figures can depend on."""
    import platform

    import megavg

    found = {"megavg": megavg.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_set(folder: Path, name: str, rows: Sequence[dict], result: dict, num_worst: int,
              pictures_of: Callable[[list[tuple[str, str]]], Mapping[tuple[str, str], Any]]) -> list[str]:
    """Write rows.jsonl, worst.jsonl and worst.png of one set; returns the names of the files.

    ``pictures_of(names)`` gives the decoded pictures of (shard, key) pairs.
    """
    worst = worst_rows(rows, num_worst)
    pictures = pictures_of([(row["shard"], row["key"]) for row in worst]) if worst else {}
    panel = worst_panel(worst, pictures, name, result)
    if panel is not None:
        panel.save(folder / "worst.png.tmp", "PNG")
        os.replace(folder / "worst.png.tmp", folder / "worst.png")
    contents = {"rows.jsonl": rows, **({"worst.jsonl": worst} if worst else {})}
    for file, content in contents.items():
        write_beside(folder / file, "".join(json.dumps(row) + "\n" for row in content))
    return [*contents, *(["worst.png"] if panel is not None else [])]


def write_results(folder: Path, results: Mapping[str, dict], rows_of_set: Mapping[str, Sequence[dict]],
                  about: Mapping[str, Any]) -> str:
    """Write results.json and results.md of all sets; returns the text of the latter.

    Args:
        results: by set, what :func:`megavg.evaluation.figures.figures` gives with the tables and counts of the run.
        rows_of_set: by set, its rows.
        about: what the figures belong to: model, layout, prompts, configuration, versions.
    """
    columns, left_out = refcoco_columns(rows_of_set), refcoco_left_out(rows_of_set)
    refcoco = [{"dataset": dataset, "split": split, **found} for (dataset, split), found in columns.items()]
    content = {"about": dict(about), "sets": dict(results), **({"refcoco": refcoco} if refcoco else {}),
               **({"refcoco_left_out": left_out} if left_out else {})}
    write_beside(folder / "results.json", json.dumps(content, indent=2) + "\n")
    text = report(results, columns, left_out, about)
    write_beside(folder / "results.md", text)
    return text


def report(results: Mapping[str, dict], columns: Mapping[tuple[str, str], dict], left_out: Mapping[str, int],
           about: Mapping[str, Any]) -> str:
    """The Markdown of a whole evaluation; ``left_out``: samples of RefCOCO that are in none of the columns."""
    parts = [f"# Evaluation of {about['model']}", _overview(results)]
    if columns or left_out:
        parts.append("## RefCOCO")
    if columns:
        parts.append(refcoco_markdown(columns))
    if left_out:
        counts = ", ".join(f"{name} {count}" for name, count in left_out.items())
        parts.append("In none of the eight official splits (UNC's of RefCOCO and RefCOCO+, UMD's of RefCOCOg): "
                     f"{counts}.")
    for name, result in results.items():
        parts += [f"## {name}", *_details(name, result)]
    parts += ["## How it was measured", _about(results, about)]
    return "\n\n".join(parts) + "\n"


def _overview(results: Mapping[str, dict]) -> str:
    """One row for each set and task, with the figures of that task."""
    lines = []
    for name, result in results.items():
        parts = result["tasks"].values() if result["task"] == "mixed" else [result]
        for part in parts:
            title, value = headline(part)
            lines.append([name, part["task"], title, percent(value), _others(part),
                          percent(part["parse_rate"]), str(part["num_samples"]), str(result["skipped"])])
    return markdown(["set", "task", "measure", "%", "also", "parsed %", "samples", "left out"], lines)


def _others(part: dict) -> str:
    """The figures beside the headline, in a few words."""
    names = {"rec": (("acc_at_50_inclusive", "IoU >= 0.5"), ("acc_at_70", "@0.7"), ("acc_at_90", "@0.9"),
                     ("mean_iou", "mean IoU"), ("center_in_box", "centre in box")),
             "detection": (("map_50", "mAP50"), ("map_75", "mAP75"), ("mar_100", "mAR"), ("mean_iou", "mean IoU")),
             "classification": (("macro_accuracy", "mean over classes"),)}
    return ", ".join(f"{title} {percent(part[key])}" for key, title in names.get(part["task"], ()))


def _details(name: str, result: dict) -> list[str]:
    found = []
    if "screenspot" in result:
        found.append(screenspot_markdown(result["screenspot"]))
    elif result.get("groups"):
        found.append(groups_markdown(result["groups"], result["group_by"]))
    if set(result["reasons"]) - {"ok"}:
        found.append("Reasons: " + ", ".join(f"{reason} {count}" for reason, count in result["reasons"].items()) + ".")
    if result["skipped"]:
        found.append("Left out as unusable: " + ", ".join(f"{reason} {count}" for reason, count in
                                                          result["skipped_reasons"].items()) + ".")
    if result.get("frame_warning"):
        found.append(f"**Warning:**\n\n```\n{result['frame_warning']}\n```")
    files = [f"[{file}]({name}/{file})" for file in result["files"]]
    return [*found, f"Files: {', '.join(files)}."]


def _about(results: Mapping[str, dict], about: Mapping[str, Any]) -> str:
    lines = [f"- model {about['model']} ({about['family']}, {about['dtype']}), {about['layout']}, greedy, at most "
             f"{about['max_new_tokens']} tokens",
             "- versions: " + ", ".join(f"{name} {version}" for name, version in about["versions"].items())]
    cut = {name: result["truncated_rate"] for name, result in results.items() if result["truncated_rate"]}
    if cut:
        lines.append("- answers cut off at the length limit: " + ", ".join(f"{name} {percent(share)} %"
                                                                           for name, share in cut.items()))
    if any("detection" in result.get("tasks", [result["task"]]) for result in results.values()):
        lines.append("- detection: where an answer states no confidence, its boxes rank in the order of the answer, so "
                     "mAP is not on one scale with that of a detector that ranks its boxes; crowds (iscrowd) are not "
                     "in the shards, and an object is small, medium or large by the area of its box, not of its mask")
    return "\n\n".join(["\n".join(lines), *(f"Question ({task}):\n\n{_block(text)}"
                                            for task, text in about["prompts"].items())])


def _block(text: str) -> str:
    """Text as a code block, every blank and line end as it is; the fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
