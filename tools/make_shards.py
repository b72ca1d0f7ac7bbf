"""Make webdataset shards from drawn scenes or annotated pictures.

    python tools/make_shards.py --format scenes --count 2048 --seed 1 --out data/scenes
    python tools/make_shards.py --format jsonl --annotations boxes.jsonl --split train --crop 256x192 --out data/train
    mpirun -n 8 python tools/make_shards.py --format coco --annotations instances.json --image-root train2017 --out DIR
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import time
import traceback
from typing import Any, Mapping

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from tools.shard_formats import (  # noqa: E402
    Format, add_source_options, check_source_options, load_formats, named_texts, whole, with_fields)

PROGRESS_SECONDS = 2.0
NUM_SHOWN = 5


def size(text: str) -> tuple[int, int]:
    """Width and height in pixels, written WxH."""
    width, cross, height = text.lower().partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"{text!r} is not WxH in pixels, such as 256x192")
    return whole(width), whole(height)


def whole_or_zero(text: str) -> int:
    """A whole number of at least 0."""
    return 0 if text == "0" else whole(text)


def build_parser(formats: Mapping[str, Format]) -> argparse.ArgumentParser:
    """The command line, common options first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--format", required=True, choices=sorted(formats),
                        help="; ".join(f"{name}: {fmt.help}" for name, fmt in formats.items()).replace("%", "%%"))
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the shards and index.json")
    parser.add_argument("--prefix", default="shard", help="shards are named PREFIX-000000.tar, ... (default: shard)")
    parser.add_argument("--samples-per-shard", type=whole, default=256, metavar="N", help="default 256")
    parser.add_argument("--image-format", choices=("keep", "png", "jpg", "webp"), default="keep",
                        help="keep (default) stores the source's own bytes, with their metadata, and changed or drawn "
                             "pictures as png; png and webp keep every pixel, jpg does not; these three hold no "
                             "metadata")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of scenes and crops (default 0)")
    parser.add_argument("--limit", type=whole, metavar="N", help="stop after N samples")
    parser.add_argument("--crop", type=size, metavar="WxH",
                        help="cut random windows of this size around the boxes; samples that do not fit are left out")
    parser.add_argument("--crops-per-object", type=whole, metavar="N",
                        help="with --crop: windows per sample (default 1)")
    parser.add_argument("--resize", type=size, metavar="WxH", help="resize (after --crop) to this size, boxes with it")
    parser.add_argument("--meta", type=named_texts, default={}, metavar="NAME=TEXT,...",
                        help="fields for every record, such as dataset=refcoco,split=val, by which the tables of an "
                             "evaluation are made, where the source does not say them (not for --format scenes)")
    parser.add_argument("--on-error", choices=("raise", "skip"), default="raise",
                        help="a broken picture, or a box that is empty or outside: stop (default), or leave it out "
                             "and list it in left_out.jsonl")
    parser.add_argument("--max-skipped", type=whole_or_zero, default=100, metavar="N",
                        help="with --on-error skip: stop all the same after N bad samples (default 100)")
    parser.add_argument("--on-duplicate", choices=("keep", "skip", "raise"), default="keep",
                        help="a sample with the same picture, question and answer as an earlier one: keep and count it "
                             "(default: published test sets hold such pairs, and their scores count both), leave it "
                             "out, or stop")
    parser.add_argument("--processes", type=whole, default=1, metavar="N",
                        help="build N shards at a time (default 1); the bytes do not depend on it")
    parser.add_argument("--dry-run", action="store_true", help="count the samples, show five, and write nothing")
    parser.add_argument("--overwrite", action="store_true",  help="begin anew, and replace the shards that are in DIR")
    add_source_options(parser, formats)
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace, formats: Mapping[str, Format],
                    rank: int) -> None:
    """Refuse options that do not go together, and (rank 0) a folder that holds something but an unfinished build."""
    check_source_options(parser, args, formats)
    if args.meta and args.format == "scenes":
        parser.error("--meta does not belong to --format scenes")
    if args.crops_per_object and not args.crop:
        parser.error("--crops-per-object needs --crop WxH")
    if args.dry_run or rank != 0:
        return
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        parser.error(f"--out {args.out} is a file; name a folder")
    held = os.listdir(args.out) if os.path.isdir(args.out) else []
    if held and ".unfinished" not in held and not args.overwrite:
        parser.error(f"--out {args.out} is not empty; add --overwrite to replace its shards, or choose another folder")


def build_options(args: argparse.Namespace) -> Any:
    """The builder's options from the command line."""
    from megavg.data.builder.options import BuildOptions

    return BuildOptions(args.prefix, args.samples_per_shard, args.image_format, args.crop, args.crops_per_object or 1,
                        args.resize, args.seed, args.limit, args.on_error, args.max_skipped, args.on_duplicate)


class Progress:
    """Says how far the work is: a bar on a terminal, else a line every two seconds; nothing on ranks other than 0."""

    def __init__(self, rank: int, num_ranks: int):
        self.silent = rank != 0
        self.words = f"rank 0 of {num_ranks}" if num_ranks > 1 else "building"
        self.started = self.reported = time.monotonic()
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self.silent:
            return
        if sys.stderr.isatty():
            self._draw(done, total)
        elif time.monotonic() - self.reported >= PROGRESS_SECONDS:
            self.reported = time.monotonic()
            rate = done / (self.reported - self.started)
            print(f"  {self.words}: {done} of {total} samples, {rate:.0f}/s", file=sys.stderr, flush=True)

    def _draw(self, done: int, total: int) -> None:
        if self.bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(TextColumn(self.words), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                                console=Console(stderr=True))
            self.task = self.bar.add_task("", total=total)
            self.bar.start()
        self.bar.update(self.task, completed=done)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.stop()


def dry_run(drafts: Any, args: argparse.Namespace) -> None:
    """Print the number of samples and the first five."""
    from megavg.data.builder.plan import make_plan

    plan = make_plan(drafts, build_options(args))
    for draft, _ in itertools.islice(itertools.chain.from_iterable(plan.shards), NUM_SHOWN):
        print(f"{draft.key}\n  {draft.where}\n  picture: {draft.image or 'drawn'}")
        for name in ("task", "expression", "labels", "boxes_xyxy_px"):
            if name in draft.fields:
                print(f"  {name}: {str(draft.fields[name])[:200]}")
        if draft.problem is not None:
            print(f"  bad: {draft.problem[0]}: {draft.problem[1]}")
    unfit = f"; {len(plan.left_out)} do not fit the --crop window" if plan.left_out else ""
    print(f"{plan.num_units} samples in {len(plan.shards)} shards of up to {args.samples_per_shard}{unfit}; "
          "nothing was written, no picture was decoded")


def report(index: dict[str, Any], args: argparse.Namespace) -> None:
    """Say what was written and what was left out."""
    print(f"wrote {index['num_samples']} samples in {len(index['shards'])} shards "
          f"({index['bytes'] / 1e6:.1f} MB) to {args.out}")
    for reason, told in index["left_out"].items():
        first = told["first"][0]
        print(f"left out {told['count']}: {reason}, first {first['key']}: {first['detail']}")
    if index["left_out"]:
        print(f"all that was left out is listed in {os.path.join(args.out, 'left_out.jsonl')}")
    if index["duplicates"]["count"]:
        what = {"keep": "are kept", "skip": "were left out"}[args.on_duplicate]
        first = " and ".join(index["duplicates"]["first"][0])
        print(f"duplicates: {index['duplicates']['count']} samples with the same picture, question and answer as an "
              f"earlier one {what}; first: {first}")


def run(args: argparse.Namespace, formats: Mapping[str, Format], ranks: Any) -> int:
    """Read, build and report; returns the exit status."""
    from megavg.data.builder.build import build_shards
    from megavg.data.builder.ranks import RanksError

    progress = Progress(ranks.rank, ranks.size)
    try:
        drafts = with_fields(formats[args.format].drafts(args), args.meta)
        if args.dry_run:
            if ranks.rank == 0:
                dry_run(drafts, args)
            return 0
        if ranks.rank == 0:
            print(f"make_shards: writing {args.format} to {args.out}", file=sys.stderr, flush=True)
        index = build_shards(drafts, args.out, build_options(args), args.processes, ranks, args.overwrite, progress)
    except RanksError as error:
        if ranks.rank == 0:
            print(f"make_shards: error: {error}", file=sys.stderr, flush=True)
        return 1
    except (ValueError, OSError) as error:
        where = f"rank {ranks.rank}: " if ranks.size > 1 else ""
        print(f"make_shards: error: {where}{error}", file=sys.stderr, flush=True)
        ranks.abort()
        return 1
    finally:
        progress.close()
    if ranks.rank == 0:
        report(index, args)
    return 0


def parse(argv: list[str] | None, formats: Mapping[str, Format], ranks: Any) -> argparse.Namespace:
    """The arguments; what is wrong with them is said by rank 0 alone, and all ranks end together."""
    parser, code, args = build_parser(formats), None, None
    with open(os.devnull, "w", encoding="utf-8") as silent, contextlib.ExitStack() as stack:
        if ranks.rank != 0:
            stack.enter_context(contextlib.redirect_stderr(silent))
            stack.enter_context(contextlib.redirect_stdout(silent))
        try:
            args = parser.parse_args(argv)
            check_arguments(parser, args, formats, ranks.rank)
        except SystemExit as stop:
            code = stop.code
    code = ranks.broadcast(code)
    if code is not None:
        raise SystemExit(code)
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    from megavg.data.builder.ranks import join_ranks

    try:
        ranks = join_ranks()
    except ValueError as error:
        print(f"make_shards: error: {error}", file=sys.stderr)
        return 1
    # A file name or a bad row may hold what no encoding has.
    sys.stdout.reconfigure(errors="backslashreplace")
    formats = load_formats()
    args = parse(argv, formats, ranks)
    try:
        return run(args, formats, ranks)
    except KeyboardInterrupt:
        print("make_shards: stopped; the same command, without --overwrite, continues after the finished shards",
              file=sys.stderr)
        ranks.abort()
        return 130
    except BaseException:
        if ranks.size > 1:  # the others would wait for this rank for ever
            traceback.print_exc()
            ranks.abort()
        raise


if __name__ == "__main__":
    sys.exit(main())
