"""Look into a checkpoint: what wrote it, norms and NaNs of every layer, checksums, and what another has otherwise.

    python tools/inspect_checkpoint.py runs/demo
    python tools/inspect_checkpoint.py runs/demo/checkpoints/step-000100 --check --by tensor --json report.json
    python tools/inspect_checkpoint.py runs/demo/checkpoints/step-000100 runs/demo/hf --cast bfloat16

Exit status: 0 all well (of two: every tensor equal bit for bit), 1 a NaN, an Inf, a damaged file or a difference,
2 wrong arguments, or a folder that cannot be read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

PROGRESS_SECONDS = 5.0
DTYPES = ("float32", "bfloat16", "float16")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", help="a folder step-*, a run's output folder (its newest checkpoint), "
                                                     "or a Hugging Face directory")
    parser.add_argument("other", metavar="OTHER", nargs="?", help="a second one, to compare the first with")
    parser.add_argument("--by", choices=("layer", "tensor", "kind"), default="layer",
                        help="lines of the tables (default layer); kind joins the same tensor of all layers")
    parser.add_argument("--check", action="store_true", help="read every file and compare its checksum")
    parser.add_argument("--cast", choices=DTYPES, help="compare after this cast of both; default: as they are stored, "
                                                       "the narrower one widened")
    parser.add_argument("--json", metavar="FILE", help="write the whole report as JSON; - writes it to the output")
    parser.add_argument("--max-listed", type=int, default=20, metavar="N",
                        help="names that are printed of each sort (default 20); the JSON holds all")
    return parser


class Progress:
    """Tells on the error output, now and then, how many bytes are done."""

    def __init__(self, total: int):
        self._done, self._total, self._started = 0, total, time.monotonic()
        self._told = self._started

    def __call__(self, num_bytes: int) -> None:
        self._done += num_bytes
        now = time.monotonic()
        if now - self._told >= PROGRESS_SECONDS:
            self._told = now
            print(f"  {self._done / 1e6:.0f} of {self._total / 1e6:.0f} MB, "
                  f"{self._done / 1e6 / (now - self._started):.0f} MB/s", file=sys.stderr, flush=True)


def check(path: Path) -> dict[str, Any]:
    """What the checksums say, where there are any."""
    from megavg.checkpoint.saved import is_saved
    from megavg.checkpoint.survey import check_files

    if not is_saved(path):
        return {"checksums": False, "wrong": [], "unknown": []}
    wrong, unknown = check_files(path)
    return {"checksums": True, "wrong": wrong, "unknown": unknown}


def report_of(args: argparse.Namespace) -> dict[str, Any]:
    """The report as plain JSON; damaged files end it early, for their tensors may not be readable."""
    import torch

    from megavg.checkpoint.difference import compare
    from megavg.checkpoint.survey import describe, find_checkpoint, open_holding, survey

    paths = [find_checkpoint(path) for path in (args.path, args.other) if path]
    report: dict[str, Any] = {"ok": False, "by": args.by}
    if args.check:
        report["check"] = {str(path): check(path) for path in paths}
        if any(found["wrong"] for found in report["check"].values()):
            return report
    holdings = [open_holding(path) for path in paths]
    report["about"] = [describe(holding) for holding in holdings]
    total = sum(state["bytes"] for state in report["about"][0]["state"].values())
    if len(holdings) == 1:
        report |= survey(holdings[0], args.by, Progress(total))
        return report | {"ok": not report["not_finite"]}
    dtype = getattr(torch, args.cast) if args.cast else None
    report |= compare(*holdings, args.by, dtype, Progress(total))
    return report | {"ok": report["equal"], "cast": args.cast}


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the report for a person."""
    for path, found in report.get("check", {}).items():
        for line in found["wrong"]:
            print(f"WRONG: {line}")
        for name in found["unknown"][:args.max_listed]:
            print(f"note: {name} in {path} is not in its manifest")
        if not found["checksums"]:
            print(f"note: a Hugging Face directory has no checksums; {path} is only read")
        elif not found["wrong"]:
            print(f"checksums: every file of {path} is as it was written")
    for about in report.get("about", []):
        _show_about(about)
    if "equal" in report:
        _show_difference(report, args)
    elif "tables" in report:
        for kind, rows in report["tables"].items():
            shape = {"shape": ""} if args.by == "tensor" else {}
            _table(kind, [_in_words(row) for row in rows], {
                "tensors": "d", "dtype": "", **shape, "parameters": ",d", "bytes": ",d", "norm": ".6g",
                "largest": ".6g", "nan": "d", "inf": "d"})
        _list("WRONG: not finite", [f"{entry['name']}: {entry['nan']} NaN, {entry['inf']} Inf"
                                    for entry in report["not_finite"]], args.max_listed)
        if report["ok"]:
            print("every number is finite")


def _in_words(row: dict[str, Any]) -> dict[str, Any]:
    """A line of the table with its dtypes and shape as text."""
    dtypes = row["dtypes"] if len(row["dtypes"]) == 1 else {f"{n} {dtype}": n for dtype, n in row["dtypes"].items()}
    return {**row, "dtype": " ".join(dtypes), "shape": row["shape"] and "x".join(map(str, row["shape"]))}


def _show_about(about: dict[str, Any]) -> None:
    print(f"{about['path']}: {about['what']}, {about['family']}, {about['bytes'] / 1e6:,.1f} MB")
    if "step" in about:
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        print(f"  step {about['step']}, layout {about['layout']}, {about['world_size']} ranks, model.dtype "
              f"{about['dtype']}; written {about['written']} by {versions}")
    if "algorithm" in about:
        place = ", ".join(f"{key} {value}" for key, value in about["data"].items())
        print(f"  algorithm {about['algorithm']}, {about['optimizer_steps']} updates; data: {place or 'unknown'}")
    for kind, sizes in about["state"].items():
        dtypes = ", ".join(f"{count} in {dtype}" for dtype, count in sizes["dtypes"].items())
        print(f"  {kind}: {sizes['tensors']} tensors ({dtypes}), {sizes['parameters']:,} parameters, "
              f"{sizes['bytes'] / 1e6:,.1f} MB")
    if about["tied_head_left_out"]:
        print("  lm_head.weight is stored too, but the head is tied to the embedding: it is left out")


def _show_difference(report: dict[str, Any], args: argparse.Namespace) -> None:
    for kind in report["not_compared"]:
        print(f"note: only one of them holds {kind}; it is not compared")
    for key, title in (("only_in_first", f"only in {args.path}"), ("only_in_second", f"only in {args.other}")):
        _list(title, report[key], args.max_listed)
    for key in ("shapes", "dtypes"):
        _list(f"other {key}", [f"{entry['name']}: {entry['first']} and {entry['second']}" for entry in report[key]],
              args.max_listed)
    for kind, rows in report["tables"].items():
        _table(kind, rows, {"tensors": "d", "equal": "d", "norm": ".6g", "relative": ".3e", "largest": ".6g",
                            "not_finite": "d"})
    cast = f" in {args.cast}" if args.cast else ""
    print(f"{report['equal_tensors']} of {report['tensors']} tensors are equal bit for bit{cast}: "
          f"{'equal' if report['equal'] else 'different'}")


def _list(title: str, lines: list[str], most: int) -> None:
    for line in lines[:most]:
        print(f"{title}: {line}")
    if len(lines) > most:
        print(f"{title}: ... ({len(lines)} in all)")


def _table(kind: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    width = max(len(kind), *(len(row["group"]) for row in rows))
    print(f"\n{kind:{width}}" + "".join(f"{column:>16}" for column in columns))
    for row in rows:
        cells = ("-" if row[column] is None else format(row[column], form) for column, form in columns.items())
        print(f"{row['group']:{width}}" + "".join(f"{cell:>16}" for cell in cells))


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.max_listed < 0 or args.cast and not args.other:
        parser.error("--max-listed is at least 0, and --cast is for comparing with OTHER")
    try:
        report = report_of(args)
        if args.json and args.json != "-":
            with open(args.json + ".tmp", "w", encoding="utf-8") as file:
                json.dump(report, file, indent=1)
            os.replace(args.json + ".tmp", args.json)
    except (ValueError, OSError) as error:
        print(f"inspect_checkpoint: error: {error}", file=sys.stderr)
        return 2
    if args.json == "-":
        print(json.dumps(report, indent=1))
    else:
        show(report, args)
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
