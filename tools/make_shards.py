"""Make webdataset shards from drawn scenes or annotated pictures.

    python tools/make_shards.py --format scenes --count 2048 --seed 1 --out data/scenes
    python tools/make_shards.py --format jsonl --annotations boxes.jsonl --split train --crop 256x192 --out data/train
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

PROGRESS_SECONDS = 2.0


@dataclass(frozen=True)
class Format:
    """A source of samples: which options it reads (beside the common ones), and the function that reads them.

    ``read`` receives the parsed arguments; an option in ``optional`` that was not given is absent from them.
    """

    help: str
    read: Callable[[argparse.Namespace], Iterable[Any]]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def read_scenes(args: argparse.Namespace) -> Iterable[Any]:
    """Procedurally drawn scenes of coloured shapes."""
    from megavg.data.scenes import scenes

    options = _given(args, ("min_objects", "max_objects", "min_side", "max_side", "shapes", "colours"))
    if "min_objects" in options:
        options.setdefault("max_objects", options["min_objects"])
    return scenes(args.count, args.seed, getattr(args, "image_size", 96), **options)


def read_annotations(args: argparse.Namespace) -> Iterable[Any]:
    """Pictures listed in a JSONL file."""
    from megavg.data.readers.jsonl import read_jsonl

    return read_jsonl(args.annotations, **_given(args, ("split",)))


# A further format is one entry here, a reader in megavg/data/readers, and its options in add_source_options.
FORMATS = {
    "scenes": Format("drawn scenes of coloured shapes", read_scenes, ("count",),
                     ("image_size", "min_objects", "max_objects", "min_side", "max_side", "shapes", "colours")),
    "jsonl": Format("a JSONL file of pictures with boxes", read_annotations, ("annotations",), ("split",)),
}


def whole(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def names(text: str) -> list[str]:
    """Words separated by commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def size(text: str) -> tuple[int, int]:
    """Width and height in pixels, written WxH."""
    width, cross, height = text.lower().partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"{text!r} is not WxH in pixels, such as 256x192")
    return whole(width), whole(height)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Options that only some formats read; absent from the result unless given."""
    group = parser.add_argument_group("options of single formats")

    def add(name: str, text: str, **kwargs: Any) -> None:
        users = ", ".join(key for key, fmt in FORMATS.items() if _dest(name) in fmt.required + fmt.optional)
        group.add_argument(name, default=argparse.SUPPRESS, help=f"[{users}] {text}", **kwargs)

    add("--count", "number of scenes", type=whole, metavar="N")
    add("--image-size", "side of a scene in pixels (default 96)", type=whole, metavar="PX")
    add("--min-objects", "fewest objects in a scene (default 1)", type=whole, metavar="N")
    add("--max-objects", "most objects in a scene (default: --min-objects)", type=whole, metavar="N")
    add("--min-side", "smallest side of an object as a share of the picture", type=float, metavar="SHARE")
    add("--max-side", "largest side of an object as a share of the picture", type=float, metavar="SHARE")
    add("--shapes", "shapes to choose from, such as circle,square (default: all)", type=names, metavar="NAMES")
    add("--colours", "colours to choose from, such as red,blue (default: all)", type=names, metavar="NAMES")
    add("--annotations", "the JSONL file; image paths are relative to it", metavar="FILE")
    add("--split", "take only this split (default: all)", metavar="NAME")


def _dest(option: str) -> str:
    return option.lstrip("-").replace("-", "_")


def build_parser() -> argparse.ArgumentParser:
    """The command line, common options first."""
    formats = "; ".join(f"{name}: {fmt.help}" for name, fmt in FORMATS.items())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--format", required=True, choices=sorted(FORMATS), help=formats)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the shards and index.json")
    parser.add_argument("--prefix", default="shard", help="shards are named PREFIX-000000.tar, ... (default: shard)")
    parser.add_argument("--samples-per-shard", type=whole, default=256, metavar="N", help="default 256")
    parser.add_argument("--image-format", choices=("png", "jpg", "webp"), default="png",
                        help="png and webp keep every pixel, jpg does not (default png)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of scenes and crops (default 0)")
    parser.add_argument("--limit", type=whole, metavar="N", help="stop after N samples")
    parser.add_argument("--crop", type=size, metavar="WxH",
                        help="cut random windows of this size around the boxes; samples that do not fit are left out")
    parser.add_argument("--crops-per-object", type=whole, metavar="N",
                        help="with --crop: windows per sample (default 1)")
    parser.add_argument("--resize", type=size, metavar="WxH", help="resize (after --crop) to this size, boxes with it")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that are in DIR")
    add_source_options(parser)
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options that the format does not read, missing ones, and a folder that holds something."""
    chosen = FORMATS[args.format]
    for name in sorted({name for fmt in FORMATS.values() for name in fmt.required + fmt.optional}):
        option = "--" + name.replace("_", "-")
        if hasattr(args, name) and name not in chosen.required + chosen.optional:
            parser.error(f"{option} does not belong to --format {args.format}")
        if not hasattr(args, name) and name in chosen.required:
            parser.error(f"--format {args.format} needs {option}")
    if args.crops_per_object and not args.crop:
        parser.error("--crops-per-object needs --crop WxH")
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        parser.error(f"--out {args.out} is a file; name a folder")
    if os.path.isdir(args.out) and os.listdir(args.out) and not args.overwrite:
        parser.error(f"--out {args.out} is not empty; add --overwrite to replace its shards, or choose another folder")


class Pipeline:
    """Crops, resizes, limits and counts the samples on their way to the writer."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.num_done = self.num_unfit = 0
        self.started = self.reported = time.monotonic()

    def __call__(self, samples: Iterable[Any]) -> Iterator[Any]:
        for sample in samples:
            for variant in self._variants(sample):
                yield variant
                self.num_done += 1
                self._report()
                if self.num_done == self.args.limit:
                    return

    def _variants(self, sample: Any) -> Iterator[Any]:
        from megavg.data.crops import crop_around, resize

        if not self.args.crop:
            yield resize(sample, *self.args.resize) if self.args.resize else sample
            return
        for turn in range(self.args.crops_per_object or 1):
            rng = random.Random(f"make_shards/{self.args.seed}/{sample.key}/{turn}")
            cut = crop_around(sample, rng, *self.args.crop, out_size=self.args.resize, suffix=f"crop{turn}")
            if cut is None:
                self.num_unfit += 1
                return
            yield cut

    def _report(self) -> None:
        now = time.monotonic()
        if now - self.reported >= PROGRESS_SECONDS:
            self.reported = now
            rate = self.num_done / (now - self.started)
            print(f"  {self.num_done} samples, {rate:.0f}/s", file=sys.stderr, flush=True)


def old_shards(out_dir: str) -> set[str]:
    """Names of all shards in the folder: a reader takes every tar of a folder, so none may outlive --overwrite."""
    return {name for name in os.listdir(out_dir) if name.endswith(".tar")} if os.path.isdir(out_dir) else set()


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    from megavg.data.writer import write_shards

    pipeline, old = Pipeline(args), old_shards(args.out)
    print(f"make_shards: writing {args.format} to {args.out}", file=sys.stderr, flush=True)
    try:
        samples = pipeline(FORMATS[args.format].read(args))
        index = write_shards(samples, args.out, args.prefix, args.samples_per_shard, args.image_format)
        for name in old - {entry["name"] for entry in index["shards"]}:
            if os.path.exists(os.path.join(args.out, name)):
                os.remove(os.path.join(args.out, name))
    except (ValueError, OSError) as error:
        print(f"make_shards: error: {error}", file=sys.stderr)
        return 1
    unfit = f"; left out {pipeline.num_unfit} samples that the --crop window does not fit" if pipeline.num_unfit else ""
    print(f"wrote {index['num_samples']} samples in {len(index['shards'])} shards "
          f"({index['bytes'] / 1e6:.1f} MB) to {args.out}{unfit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
