"""Measure how fast checkpoints are saved and loaded, and what memory that takes, beside torch.save and safetensors.

    python tools/bench_checkpoint.py --size-gb 2.5 --ranks 1 --json checkpoint_bench.json

Each rank fills its share of the weights and AdamW moments of a decoder like Qwen3-VL's with random numbers. The same
bytes on the same disk are then written and read by ``Checkpoints``, by ``torch.save`` and ``torch.load``, by
safetensors, and as one plain file, in turns whose order alternates. All wait until the disk has the bytes (fsync), all
load into the tensors that are there, and every load is compared with the numbers bit for bit. Files are dropped from
the page cache before they are read; the table says what share came from the disk all the same. Growth of memory is the
peak above what the rank had before. "x torch.save" is the speed as a multiple of torch.save's. Take figures on an idle
machine; where it is not quite idle, the processor time of the slowest rank says more than the clock.

Exit status: 0, 1 what was read is not what was written, 2 wrong arguments, too little memory or disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

NUM_LAYERS = 28
SAVES = {"save": "Checkpoints.save", "write_parts": "  without checksums (write_parts)",
         "held_up": "in the background: training waits", "background": "  until it is whole",
         "torch_save": "torch.save", "safetensors_save": "safetensors save_file", "plain_write": "one plain file"}
LOADS = {"read": "Checkpoints.read", "check": "Checkpoints.check (checksums)", "resume": "  check, then read",
         "torch_load": "torch.load", "safetensors_load": "safetensors load_file", "plain_read": "one plain file"}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=2.5, metavar="GB",
                        help="of the whole state, in 1e9 bytes, 12 for a parameter (default 2.5)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes of a gloo world (default 1)")
    parser.add_argument("--turns", type=int, default=1, metavar="N", help="the median of N is told (default 1)")
    parser.add_argument("--folder", metavar="DIR", help="where the temporary folder is made (default: the system's); "
                                                        "it is the disk that is measured")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    return parser


def require(folder: str, num_bytes: int) -> None:
    """Refuse a size that does not fit before anything is made."""
    free = shutil.disk_usage(folder).free
    if free < 1.5 * num_bytes:
        raise ValueError(f"--size-gb: {num_bytes / 1e9:.2f} GB of state need {1.5 * num_bytes / 1e9:.1f} GB on the "
                         f"disk of {folder}, which has {free / 1e9:.1f} GB left; lower it, or name another --folder")
    with open("/proc/meminfo", encoding="ascii") as file:
        memory = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in file}["MemAvailable"]
    if memory < 2.5 * num_bytes:
        raise ValueError(f"--size-gb: {num_bytes / 1e9:.2f} GB of state need {2.5 * num_bytes / 1e9:.1f} GB of memory, "
                         f"with the copies that are measured; {memory / 1e9:.1f} GB are free: lower it")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Figures of all turns, from the ranks' own processes."""
    import torch.multiprocessing

    from tools.checkpoint_state import num_bytes_of, width_of
    from tools.checkpoint_turns import run_rank

    width = width_of(args.size_gb * 1e9, NUM_LAYERS)
    require(args.folder or tempfile.gettempdir(), num_bytes_of(width, NUM_LAYERS))
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint-", dir=args.folder) as folder:
        try:
            torch.multiprocessing.spawn(run_rank, (args.ranks, folder, width, NUM_LAYERS, args.turns), args.ranks)
        except torch.multiprocessing.ProcessRaisedException as error:
            raise ValueError(f"a rank failed: {str(error).strip().splitlines()[-1]}") from error
        found = json.loads(Path(folder, "figures.json").read_text())
    rows = {name: _median(name, found["turns"], found["bytes"]) for name in (*SAVES, *LOADS)}
    return {**{key: value for key, value in found.items() if key != "turns"}, "rows": rows, "ranks": args.ranks,
            "turns": args.turns, "machine": {"cpus": os.cpu_count(), "load": os.getloadavg()[0],
                                             "python": platform.python_version(), "torch": torch.__version__}}


def _median(name: str, turns: list[dict[str, Any]], num_bytes: int) -> dict[str, Any]:
    """One line of the table: medians of times, the largest growth of a rank's memory."""
    of_row = [turn[name] for turn in turns]
    seconds = statistics.median(row["seconds"] for row in of_row)
    sync = statistics.median(row["sync_seconds"] for row in of_row)
    return {"seconds": seconds, "sync_seconds": sync, "mb_per_s": num_bytes / seconds / 1e6,
            "processor_seconds": statistics.median(row["processor_seconds"] for row in of_row),
            "growth_bytes": max(row["growth_bytes"] for row in of_row),
            "from_disk": statistics.median(row["disk_bytes"] for row in of_row) / num_bytes,
            "all": [row["seconds"] for row in of_row]}


def show(figures: dict[str, Any]) -> None:
    """Print the figures as two tables."""
    machine, rows, share = figures["machine"], figures["rows"], figures["bytes_of_rank"]
    print(f"{figures['bytes'] / 1e9:.2f} GB of state in {figures['tensors']} tensors on {figures['ranks']} ranks, "
          f"largest tensor {figures['largest_tensor_bytes'] / 1e6:.1f} MB; {machine['cpus']} CPUs, load "
          f"{machine['load']:.1f}, torch {machine['torch']}, turns: {figures['turns']}")
    print("\n| save | s | processor s | MB/s | s without fsync | x torch.save | x safetensors | growth of memory |")
    print("|---|---|---|---|---|---|---|---|")
    for name, title in SAVES.items():
        row = rows[name]
        print(f"| {title} | {row['seconds']:.2f} | {row['processor_seconds']:.2f} | {row['mb_per_s']:.0f} | "
              f"{row['seconds'] - row['sync_seconds']:.2f} | {rows['torch_save']['seconds'] / row['seconds']:.2f} | "
              f"{rows['safetensors_save']['seconds'] / row['seconds']:.2f} | {_growth(row, share)} |")
    print("\n| load | s | processor s | MB/s | from the disk | x torch.load | x safetensors | growth of memory |")
    print("|---|---|---|---|---|---|---|---|")
    for name, title in LOADS.items():
        row = rows[name]
        print(f"| {title} | {row['seconds']:.2f} | {row['processor_seconds']:.2f} | {row['mb_per_s']:.0f} | "
              f"{row['from_disk']:.0%} | "
              f"{rows['torch_load']['seconds'] / row['seconds']:.2f} | "
              f"{rows['safetensors_load']['seconds'] / row['seconds']:.2f} | {_growth(row, share)} |")
    growth, largest = rows["read"]["growth_bytes"] / 1e6, figures["largest_tensor_bytes"] / 1e6
    print(f"\nReading grows memory by {growth:.1f} MB, {growth / largest:.2f} x the largest tensor ({largest:.1f} MB).")
    if min(rows[name]["from_disk"] for name in LOADS if name != "resume") < 0.9:
        print("The page cache served reads: their figures are those of memory, not of the disk.")


def _growth(row: dict[str, Any], share: int) -> str:
    return f"{row['growth_bytes'] / 1e6:.0f} MB ({row['growth_bytes'] / share:.2f} of its state)"


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.size_gb < 0.001 or min(args.ranks, args.turns) < 1:
        parser.error("--size-gb is at least 0.001, --ranks and --turns at least 1")
    try:
        figures = measure(args)
    except (ValueError, OSError) as error:
        print(f"bench_checkpoint: error: {error}", file=sys.stderr)
        return 2
    if args.json:
        with open(args.json + ".tmp", "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)
        os.replace(args.json + ".tmp", args.json)
    show(figures)
    if not figures["equal"]:
        print("WRONG: what was read is not what was written", file=sys.stderr)
    return 0 if figures["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
