"""Measure how many samples a second come out of shards, beside plain webdataset on the same shards.

    python tools/bench_streaming.py --images 2000 --size 640x480 --format jpg --workers 4 --turns 5
    python tools/bench_streaming.py --shards data/train --workers 4 --json streaming.json

Every reader takes its turn in this process, in an order that alternates, and gives the same: pictures decoded to RGB,
JSON parsed. Plain webdataset is ``WebDataset(shards, shardshuffle=False).decode("pil")``; with workers it is compared
through its own ``WebLoader`` of as many. The figures are medians over the turns; run it on an idle machine, twice. The
processor time of this process is shown beside: without workers it says the same where the machine is not quite idle.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from typing import Any, Callable, Iterable, Iterator

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tools/bench_streaming.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", nargs="+", help="measure on these instead of drawn pictures")
    parser.add_argument("--images", type=int, default=1000, help="drawn pictures (default 1000)")
    parser.add_argument("--size", default="512x384", help="of a drawn picture, WIDTHxHEIGHT in pixels")
    parser.add_argument("--format", default="jpg", choices=("jpg", "png", "webp"), help="of drawn pictures")
    parser.add_argument("--per-shard", type=int, default=250, help="drawn pictures in a shard")
    parser.add_argument("--workers", type=int, default=0, help="also measure with so many worker processes")
    parser.add_argument("--turns", type=int, default=5, help="turns of each reader, after one that is not counted")
    parser.add_argument("--batch", type=int, default=32, help="global batch of PromptSource")
    parser.add_argument("--buffer", type=int, default=1000, help="shuffle buffer of PromptSource")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args(argv)
    for name in ("images", "per_shard", "turns", "batch", "buffer"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


def draw(count: int, width: int, height: int) -> Iterator[Any]:
    """Pictures that compress like photographs: coarse colour noise, enlarged."""
    from PIL import Image

    from megavg.protocols.sample import Sample

    rng = random.Random(0)
    for number in range(count):
        small = Image.frombytes("RGB", (width // 8 + 1, height // 8 + 1),
                                rng.randbytes((width // 8 + 1) * (height // 8 + 1) * 3))
        image = small.resize((width, height), Image.Resampling.BICUBIC)
        yield Sample(f"b{number:06d}", "", image, width, height, "the blue thing", ((1.0, 2.0, 30.0, 40.0),),
                     {"kind": "drawn"})


def plain(shards: list[str], workers: int = 0) -> Iterable[Any]:
    """Samples of plain webdataset, through its loader where there are workers."""
    import webdataset

    dataset = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("pil")
    return webdataset.WebLoader(dataset, batch_size=None, num_workers=workers) if workers else dataset


def prompt_source(shards: list[str], arguments: argparse.Namespace, workers: int) -> Iterator[Any]:
    """Samples of one epoch of ``PromptSource``."""
    from megavg.data.shards import PromptSource

    with PromptSource(shards, arguments.batch, 0, shuffle_buffer=arguments.buffer, infinite=False,
                      num_workers=workers) as source:
        for batch in source:
            yield from batch


def readers(shards: list[str], arguments: argparse.Namespace) -> dict[str, tuple[Callable[[], Iterable], str]]:
    """Name -> (what to read, name of the reader that it is compared with)."""
    from megavg.data.shards import iterate_all

    found = {"webdataset": (lambda: plain(shards), "webdataset"),
             "PromptSource": (lambda: prompt_source(shards, arguments, 0), "webdataset"),
             "iterate_all": (lambda: iterate_all(shards), "webdataset")}
    if arguments.workers:
        n = arguments.workers
        found[f"webdataset, {n} workers"] = (lambda: plain(shards, n), f"webdataset, {n} workers")
        found[f"PromptSource, {n} workers"] = (lambda: prompt_source(shards, arguments, n), f"webdataset, {n} workers")
    return found


def measure(reader: Callable[[], Iterable]) -> tuple[float, float, int]:
    """Samples a second, processor milliseconds a sample and the number of samples; starting workers counts."""
    started, processor = time.perf_counter(), time.process_time()
    count = sum(1 for _ in reader())
    if not count:
        raise SystemExit("the shards hold no sample")
    return count / (time.perf_counter() - started), 1000 * (time.process_time() - processor) / count, count


def bench(shards: list[str], arguments: argparse.Namespace) -> dict:
    chosen = readers(shards, arguments)
    rates: dict[str, list[float]] = {name: [] for name in chosen}
    processor: dict[str, list[float]] = {name: [] for name in chosen}
    counts = set()
    for turn in range(arguments.turns + 1):  # the first one warms up
        for name in list(chosen)[::1 if turn % 2 else -1]:
            rate, milliseconds, count = measure(chosen[name][0])
            counts.add(count)
            if turn:
                rates[name].append(rate)
                processor[name].append(milliseconds)
    if len(counts) != 1:
        raise SystemExit(f"the readers disagree on the number of samples: {sorted(counts)}")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {"samples": counts.pop(), "turns": arguments.turns, "readers": {
        name: {"samples_per_second": medians[name], "all": rates[name], "beside": beside,
               "ratio": medians[name] / medians[beside],
               "processor_ms_per_sample": statistics.median(processor[name])}
        for name, (_, beside) in chosen.items()}}


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    from megavg.data.shards import expand_shards
    from megavg.data.writer import write_shards

    with tempfile.TemporaryDirectory() as folder:
        if not arguments.shards:
            width, height = map(int, arguments.size.lower().split("x"))
            write_shards(draw(arguments.images, width, height), folder, "bench", arguments.per_shard, arguments.format)
        figures = bench(expand_shards(arguments.shards or folder), arguments)
    print(f"{figures['samples']} samples, median of {figures['turns']} turns, samples a second")
    for name, row in figures["readers"].items():
        print(f"  {name:28s} {row['samples_per_second']:9.1f}  {row['processor_ms_per_sample']:7.2f} ms of processor   "
              f"{row['ratio']:5.2f} x {row['beside']}")
    if arguments.json:
        with open(arguments.json + ".tmp", "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)
        os.replace(arguments.json + ".tmp", arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
