"""Measure how fast shards are built, how that grows with processes, and how far it is from plain tar writing.

    python tools/bench_shards.py --num-pictures 2000 --processes 1,2,4,8 --out shards_bench.json

It draws pictures into a temporary folder, builds the same set with every number of processes (the bytes must agree),
and writes the same members with ``tarfile`` alone, unread and unchecked: the floor that no builder can pass with one
process. Take figures on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from typing import Any

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from tools.make_shards import size  # noqa: E402
from tools.shard_formats import whole  # noqa: E402


def counts(text: str) -> list[int]:
    """Whole numbers separated by commas."""
    return [whole(part) for part in text.split(",")]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--num-pictures", type=whole, default=400, metavar="N", help="default 400")
    parser.add_argument("--samples-per-picture", type=whole, default=1, metavar="N",
                        help="consecutive samples that share a picture (default 1; RefCOCO has about 7)")
    parser.add_argument("--picture-size", type=size, default=(640, 480), metavar="WxH", help="default 640x480")
    parser.add_argument("--picture-format", choices=("jpg", "png"), default="jpg", help="of the source (default jpg)")
    parser.add_argument("--image-format", choices=("keep", "png", "jpg", "webp"), default="keep",
                        help="of the shards (default keep)")
    parser.add_argument("--samples-per-shard", type=whole, default=64, metavar="N", help="default 64")
    parser.add_argument("--processes", type=counts, default=[1, 2, 4], metavar="N,N,...", help="default 1,2,4")
    parser.add_argument("--repeats", type=whole, default=3, metavar="N", help="the best of N is told (default 3)")
    parser.add_argument("--folder", metavar="DIR", help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")
    return parser


def draw_pictures(folder: str, args: argparse.Namespace) -> list[Any]:
    """Write pictures that compress like photographs, smooth with fine noise, and return their drafts."""
    from PIL import Image, ImageFilter

    from megavg.data.readers.base import Draft, ImageFile
    from megavg.data.writer import encode_image

    width, height = args.picture_size
    drafts = []
    for number in range(args.num_pictures):
        rng = random.Random(number)
        coarse = Image.frombytes("RGB", (16, 12), rng.randbytes(16 * 12 * 3)).resize((width, height))
        fine = Image.frombytes("RGB", (width, height), rng.randbytes(width * height * 3))
        image = Image.blend(coarse, fine.filter(ImageFilter.GaussianBlur(1)), 0.2)
        path = os.path.join(folder, f"{number:06d}.{args.picture_format}")
        with open(path, "wb") as file:
            file.write(encode_image(image, args.picture_format))
        for turn in range(args.samples_per_picture):
            box = [turn, turn, width / 2 + turn, height / 2 + turn]
            drafts.append(Draft(f"picture {number}", f"p{number:06d}-{turn}", ImageFile(path), {
                "width": width, "height": height, "expression": f"thing {turn}", "boxes_xyxy_px": [box]}))
    return drafts


def write_floor(drafts: list[Any], folder: str, samples_per_shard: int) -> float:
    """Seconds that reading the pictures and writing the same members takes, without a look at what they are."""
    from megavg.data.writer import write_tar

    def members(draft: Any) -> tuple[str, dict[str, bytes]]:
        suffix = str(draft.image).rsplit(".", 1)[1]
        return draft.key, {suffix: draft.image.read(), "json": json.dumps({"id": draft.key, **draft.fields}).encode()}

    started = time.perf_counter()
    for number, start in enumerate(range(0, len(drafts), samples_per_shard)):
        write_tar(os.path.join(folder, f"floor-{number:06d}.tar"),
                  map(members, drafts[start:start + samples_per_shard]))
    return time.perf_counter() - started


def measure(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Figures of all runs; raises ``RuntimeError`` when the sets differ."""
    from megavg.data.builder.build import build_shards
    from megavg.data.builder.options import BuildOptions

    pictures, floor = os.path.join(folder, "pictures"), os.path.join(folder, "floor")
    os.mkdir(pictures)
    os.mkdir(floor)
    drafts = draw_pictures(pictures, args)
    options = BuildOptions(samples_per_shard=args.samples_per_shard, image_format=args.image_format)
    floor_seconds = min(write_floor(drafts, floor, args.samples_per_shard) for _ in range(args.repeats))
    rows, checksums = [], set()
    for num_processes in args.processes:
        seconds = []
        for _ in range(args.repeats):
            started = time.perf_counter()
            index = build_shards(drafts, os.path.join(folder, "shards"), options, num_processes, overwrite=True)
            seconds.append(time.perf_counter() - started)
            checksums.add(tuple(shard["sha256"] for shard in index["shards"]))
        rows.append({"processes": num_processes, "seconds": min(seconds),
                     "samples_per_second": len(drafts) / min(seconds)})
    if len(checksums) > 1:
        raise RuntimeError("the sets differ with the number of processes")
    return {"samples": len(drafts), "bytes": index["bytes"], "floor_seconds": floor_seconds,
            "floor_samples_per_second": len(drafts) / floor_seconds, "runs": rows,
            "options": {name: value for name, value in vars(args).items() if name not in ("out", "folder")},
            "machine": {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}}


def show(figures: dict[str, Any]) -> None:
    """Print the figures as a table."""
    floor = figures["floor_samples_per_second"]
    print(f"{figures['samples']} samples, {figures['bytes'] / 1e6:.1f} MB; {figures['machine']['cpus']} CPUs, load "
          f"{figures['machine']['load']:.1f}")
    print("| processes | samples/s | MB/s | beside one process | beside plain tar writing |")
    print("|---|---|---|---|---|")
    first = next((row for row in figures["runs"] if row["processes"] == 1), figures["runs"][0])
    for row in figures["runs"]:
        rate = row["samples_per_second"]
        print(f"| {row['processes']} | {rate:.0f} | {figures['bytes'] / row['seconds'] / 1e6:.1f} | "
              f"{rate / first['samples_per_second']:.2f} | {rate / floor:.2f} |")
    print(f"| plain tar writing | {floor:.0f} | {figures['bytes'] / figures['floor_seconds'] / 1e6:.1f} | | 1 |")


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench_shards-", dir=args.folder) as folder:
        figures = measure(args, folder)
    if args.out:
        with open(args.out + ".tmp", "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)
        os.replace(args.out + ".tmp", args.out)
    show(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
