"""Read finished shards from end to end: checksums, counts, box statistics, pictures that leak, and a sheet to look at.

    python tools/check_shards.py data/train --against data/test --picture train.png
    python tools/check_shards.py "data/train/*.tar" --processes 8 --json train.json

Exit status: 0 all well, 1 something is wrong, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

PROGRESS_SECONDS = 2.0
_SHADES = " .:-=+*#%@"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="a folder, a tar, a glob or a brace range")
    parser.add_argument("--against", action="append", default=[], metavar="OTHER",
                        help="shards that may not share a picture with SHARDS, such as the test set; may be repeated")
    parser.add_argument("--picture", metavar="FILE.png", help="draw some samples with their boxes on one sheet")
    parser.add_argument("--num-pictures", type=int, default=24, metavar="N", help="with --picture: default 24")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="with --picture: chooses them (default 0)")
    parser.add_argument("--json", metavar="FILE", help="write the whole report as JSON; - writes it to the output")
    parser.add_argument("--max-listed", type=int, default=20, metavar="N",
                        help="problems that are printed (default 20); the JSON holds all")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="shards read at a time (default 1)")
    return parser


def find(patterns: list[str]) -> tuple[list[str], list[str]]:
    """The shards that ``patterns`` name, and those patterns that are whole folders; an index may name a lost shard."""
    from megavg.data.shards import expand_shards

    folders = [pattern for pattern in patterns if os.path.isdir(pattern)]
    empty = [folder for folder in folders if not any(name.endswith(".tar") for name in os.listdir(folder))]
    known = [folder for folder in empty if {"index.json", ".unfinished"} & set(os.listdir(folder))]
    rest = [pattern for pattern in patterns if pattern not in known]
    paths = expand_shards(rest) if rest else []
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(f"{path} is no file on this machine; shards behind a URL have to be copied first")
    return paths, folders


def read(paths: list[str], others: list[str], args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Facts of every shard of both sets, in their order."""
    from megavg.data.builder.pool import run_jobs
    from megavg.data.shard_facts import InspectJob, inspect_shard

    started = reported = time.monotonic()

    def progress(done: int) -> None:
        nonlocal reported
        if done and time.monotonic() - reported >= PROGRESS_SECONDS:
            reported = time.monotonic()
            print(f"  {done} samples, {done / (reported - started):.0f}/s", file=sys.stderr, flush=True)

    num_chosen = args.num_pictures if args.picture else 0
    jobs = [InspectJob(path, args.seed, num_chosen) for path in dict.fromkeys(paths + others)]
    facts = {fact.path: fact for fact in run_jobs(inspect_shard, jobs, args.processes, progress)}
    return [facts[path] for path in paths], [facts[path] for path in others]


def check(args: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """The report as plain JSON, and the facts it rests on."""
    from megavg.data.shard_report import describe, index_problems, leaks, record_problems, repeated, without_index

    paths, folders = find(args.shards)
    other_paths, other_folders = find(args.against) if args.against else ([], [])
    facts, others = read(paths, other_paths, args)
    twice, same = repeated(facts)
    problems = record_problems(facts) + index_problems(facts, folders) + twice
    problems += record_problems(others) + index_problems(others, other_folders)
    report = {"ok": True, "set": describe(facts), "duplicates": same}
    if args.against:
        leaked, shared = leaks(facts, others)
        problems += leaked
        report |= {"against": describe(others), "shared": shared}
    kinds: dict[str, int] = {}
    for entry in problems:
        kinds[entry["kind"]] = kinds.get(entry["kind"], 0) + 1
    report["without_index"] = without_index(facts, folders) + without_index(others, other_folders)
    report |= {"ok": not problems, "problems": {"count": len(problems), "by_kind": kinds, "all": problems}}
    return report, facts


def draw(facts: list[Any], args: argparse.Namespace) -> None:
    """The sheet of ``--num-pictures`` samples, chosen by the seed from the whole set."""
    from megavg.data.contact_sheet import contact_sheet
    from megavg.data.shard_facts import samples_at

    chosen = sorted((chance, fact.path, place) for fact in facts for chance, place in fact.chosen)[:args.num_pictures]
    found = {path: samples_at(path, {place for _, held, place in chosen if held == path})
             for path in dict.fromkeys(path for _, path, _ in chosen)}
    total = sum(fact.num_samples for fact in facts)
    sheet = contact_sheet([found[path][place] for _, path, place in chosen],
                          f"{' '.join(args.shards)}: {len(chosen)} of {total} samples, seed {args.seed}")
    sheet.save(args.picture + ".tmp", "PNG")
    os.replace(args.picture + ".tmp", args.picture)


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the report for a person."""
    held, boxes = report["set"], report["set"]["boxes"]
    print(f"{held['num_samples']} samples in {held['num_shards']} shards, {held['bytes'] / 1e6:.1f} MB, "
          f"{held['pictures']['distinct']} distinct pictures")
    for name in ("tasks", "splits", "labels"):
        if held[name]:
            print(f"{name + ':':9}" + _counts(held[name]))
    print(f"stored:  {_counts(held['pictures']['formats'])}")
    print(f"boxes:   {boxes['count']}; per sample: {_counts(boxes['per_sample'])}")
    rows = {"picture width, px": held["pictures"]["width_px"], "picture height, px": held["pictures"]["height_px"],
            "box area / picture": boxes["area_share"], "box width / height": boxes["aspect"],
            "box short side, px": boxes["short_side_px"]}
    rows = {name: row for name, row in rows.items() if row}
    if rows:
        columns = list(next(iter(rows.values())))
        print(" " * 20 + "".join(f"{column:>10}" for column in columns))
        for name, row in rows.items():
            print(f"{name:20}" + "".join(f"{row[column]:10.4g}" for column in columns))
    if boxes["count"]:
        top = max(max(row) for row in boxes["centres"])
        print("where the boxes' centres lie (8 x 8 cells of the picture, darker is more):")
        for row in boxes["centres"]:
            print("  |" + "".join(2 * _SHADES[-(-cell * (len(_SHADES) - 1) // top)] for cell in row) + "|")
    if report["duplicates"]["count"]:
        print(f"the same picture, question and answer as an earlier sample: {report['duplicates']['count']}, first "
              + " and ".join(report["duplicates"]["first"][0]))
    if "shared" in report:
        print(f"pictures shared with {' '.join(args.against)}: {report['shared']['pictures']} (in "
              f"{report['shared']['samples']} samples)")
    for folder in report["without_index"]:
        print(f"note: {folder}: no index.json; counts and checksums are unchecked")
    for entry in report["problems"]["all"][:args.max_listed]:
        where = ": ".join(part for part in (entry["shard"], entry["key"]) if part)
        print(f"WRONG: {entry['kind']}: {where}: {entry['detail']}")
    if report["problems"]["count"]:
        print(f"{report['problems']['count']} problems: {_counts(report['problems']['by_kind'])}")
    else:
        print("nothing is wrong")


def _counts(counts: dict[str, int]) -> str:
    shown = [f"{name} {count}" for name, count in list(counts.items())[:12]]
    return ", ".join(shown) + (f", ... ({len(counts)} in all)" if len(counts) > 12 else "")


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    sys.stdout.reconfigure(errors="backslashreplace")
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.num_pictures, args.processes) < 1 or args.max_listed < 0:
        parser.error("--num-pictures and --processes are at least 1, --max-listed at least 0")
    try:
        report, facts = check(args)
        if args.picture and any(fact.chosen for fact in facts):
            draw(facts, args)
        if args.json and args.json != "-":
            with open(args.json + ".tmp", "w", encoding="utf-8") as file:
                json.dump(report, file, indent=1)
            os.replace(args.json + ".tmp", args.json)
    except (ValueError, OSError) as error:
        print(f"check_shards: error: {error}", file=sys.stderr)
        return 1
    if args.json == "-":
        print(json.dumps(report, indent=1))
    else:
        show(report, args)
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
