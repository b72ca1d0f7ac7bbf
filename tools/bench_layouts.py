"""Measure what parallel layouts cost: bytes per rank beside the formulas of docs/layouts.md, and time per step.

A random model is made in a temporary folder and trained for a few steps in every layout, on the processes of this
machine. Layouts take turns; each time is the minimum over the turns. Prints two tables and ratios; --json writes all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from tools.layout_runs import VARIANTS, Layout
from tools.local_ranks import answer, progress, run_local

KINDS = ("parameters", "gradients", "optimiser", "activations")
MEASURED = ("one", "one+recompute", "tp2", "dp2", "pp2", "pp2+recompute", "tp2pp2", "tp2dp2", "pp2dp2",
            "tp4", "pp4", "pp4+recompute", "tp2pp2dp2")
TIMED = ("dp2", "dp2+no_prefetch", "dp2+keep_gathered", "tp2", "pp2", "pp2+recompute", "dp4", "dp4+keep_gathered",
         "pp2dp2", "pp2dp2+no_prefetch", "pp2dp2+keep_gathered", "pp2dp2+recompute", "tp2pp2")
QUICK_MEASURED = ("one", "tp2", "dp2", "pp2", "pp2+recompute")
QUICK_TIMED = ("dp2", "pp2")
RATIOS = {  # name: (layout, layout it is compared with); both do the same work on equally many ranks
    "pp2 / dp2": ("pp2", "dp2"), "pp2dp2 / dp4": ("pp2dp2", "dp4"), "tp2 / dp2": ("tp2", "dp2"),
    "tp2pp2 / dp4": ("tp2pp2", "dp4"),
    "own prefetch on / off, pp2dp2": ("pp2dp2", "pp2dp2+no_prefetch"),
    "DeepSpeed's prefetch on / off, dp2": ("dp2", "dp2+no_prefetch"),
    "kept gathered / not, dp2": ("dp2+keep_gathered", "dp2"),
    "kept gathered / not, dp4": ("dp4+keep_gathered", "dp4"),
    "kept gathered / not, pp2dp2": ("pp2dp2+keep_gathered", "pp2dp2"),
    "recompute on / off, pp2": ("pp2+recompute", "pp2"),
    "recompute on / off, pp2dp2": ("pp2dp2+recompute", "pp2dp2"),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Layouts are written like one, dp2, tp2pp2dp2; these options may follow:\n"
               + "\n".join(f"  +{name:15s}{what}" for name, what in VARIANTS.items()))
    parser.add_argument("--family", default="qwen2_5_vl", choices=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
    parser.add_argument("--hidden-size", type=int, help="of the decoder and the vision tower (default 512)")
    parser.add_argument("--layers", type=int, help="decoder layers (default 8)")
    parser.add_argument("--image-side", type=int, help="pixels (default 280)")
    parser.add_argument("--rows", type=int, help="of a timed step, over all ranks; one micro-batch each (default 16)")
    parser.add_argument("--processes", type=int, help="largest layout (default 4)")
    parser.add_argument("--layouts", nargs="+", metavar="LAYOUT", help="only these, in both tables")
    parser.add_argument("--only", choices=["memory", "time"], help="one of the two questions")
    parser.add_argument("--repeats", type=int, help="turns of every layout, of two steps each (default 3)")
    parser.add_argument("--quick", action="store_true",
                        help="a small model, two processes, few layouts, one turn: under a minute")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    usual = {"hidden_size": (512, 128), "layers": (8, 4), "image_side": (280, 112), "rows": (16, 8),
             "processes": (4, 2), "repeats": (3, 1)}
    for name, defaults in usual.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, defaults[arguments.quick])
        elif getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    try:
        arguments.measured, arguments.timed = chosen_layouts(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def chosen_layouts(arguments) -> tuple[list[str], list[str]]:
    """The layouts whose memory is measured, and those whose time is.

    Raises:
        ValueError: a layout that was asked for does not exist or does not fit.
    """
    if arguments.layouts:
        measured = timed = arguments.layouts
    else:
        measured, timed = (QUICK_MEASURED, QUICK_TIMED) if arguments.quick else (MEASURED, TIMED)
    found = []
    for names, question in ((measured, "memory"), (timed, "time")):
        names = [name for name in dict.fromkeys(names) if arguments.only in (None, question)]
        layouts = {name: Layout.parse(name) for name in names}
        for name, layout in layouts.items():
            if arguments.layouts and layout.world > arguments.processes:
                raise ValueError(f"layout {name} takes {layout.world} processes; raise --processes="
                                 f"{arguments.processes}")
            if question == "time" and arguments.rows % layout.data:
                raise ValueError(f"--rows={arguments.rows} is not divisible by the data-parallel size of {name}")
        found.append([name for name, layout in layouts.items() if layout.world <= arguments.processes])
    return found[0], found[1]


def measure(arguments) -> dict:
    """Every figure of a run."""
    from transformers.utils.logging import disable_progress_bar

    from megavg.models.tiny import TinySpec, make_tiny_checkpoint

    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_tiny_checkpoint(Path(folder) / "model", TinySpec(
            arguments.family, hidden_size=arguments.hidden_size, num_layers=arguments.layers, num_heads=8,
            vision_depth=4, vocab_size=8 * arguments.hidden_size, max_pixels=2**20))
        work = {"checkpoint": str(checkpoint), "dtype": arguments.dtype, "image_side": arguments.image_side,
                "answer_length": 48, "rows": arguments.rows}
        found = [_launch(world, arguments, work) for world in sorted(
            {Layout.parse(name).world for name in arguments.measured + arguments.timed})]
    memory = {name: _stages(name, [rank["memory"][name] for rank in ranks]) for ranks in found
              for name in ranks[0]["memory"]}
    seconds = {name: times for ranks in found for name, times in ranks[0]["seconds"].items()}
    best = {name: min(times) for name, times in seconds.items()}
    return {"machine": machine(), "family": arguments.family, "dtype": arguments.dtype,
            "hidden_size": arguments.hidden_size, "layers": arguments.layers, "rows": arguments.rows,
            "memory": memory, "seconds": best, "all_seconds": seconds, "ratios": ratios_of(best)}


def _launch(world: int, arguments, work: dict) -> list[dict]:
    """The results of all ranks of the layouts that take ``world`` processes."""
    measured, timed = ([name for name in names if Layout.parse(name).world == world]
                       for names in (arguments.measured, arguments.timed))
    print(f"{world} process{'es' if world > 1 else ''}", file=sys.stderr, flush=True)
    return run_local(world, __file__, {"work": work, "measured": measured, "timed": timed, "steps": 2,
                                       "repeats": arguments.repeats, "memory_micro_batches": 4})


def _stages(name: str, ranks: list[dict]) -> list[dict]:
    """One entry for each pipeline stage, with the largest rank of each kind."""
    stages = []
    for stage in range(Layout.parse(name).pipeline):
        there = [rank for rank in ranks if rank["stage"] == stage]
        largest = {kind: max((rank["bytes"][kind] for rank in there), key=lambda pair: pair[0]) for kind in KINDS}
        stages.append({**there[0], "bytes": largest})
    return stages


def ratios_of(best: dict[str, float]) -> dict[str, float]:
    """The ratios of minima whose two layouts were both run."""
    return {name: best[a] / best[b] for name, (a, b) in RATIOS.items() if a in best and b in best}


def machine() -> str:
    """What this ran on."""
    import platform

    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def print_report(report: dict) -> None:
    print(f"\n{report['machine']}\n{report['family']}, width {report['hidden_size']}, {report['layers']} layers, "
          f"{report['dtype']}")
    if report["memory"]:
        first = next(iter(report["memory"].values()))[0]
        print(f"\nMB per rank, the largest of a stage: measured, predicted, measured / predicted; micro-batches of "
              f"{first['tokens']} tokens, {first['patches']} patches\n")
        print(f"{'layout':18s}{'stage':>6s}{'layers':>7s}" + "".join(f"{kind:>22s}" for kind in KINDS))
    for name, stages in report["memory"].items():
        for stage in stages:
            cells = "".join(f"{a / 1e6:9.2f}{b / 1e6:8.2f}{a / b if b else 1:5.2f}"
                            for a, b in (stage["bytes"][kind] for kind in KINDS))
            print(f"{name if not stage['stage'] else '':18s}{stage['stage']:6d}{stage['layers']:7d}{cells}")
    if report["seconds"]:
        turns = len(next(iter(report["all_seconds"].values())))
        print(f"\nseconds of a step of {report['rows']} rows, minima of {turns}\n")
    for name, seconds in report["seconds"].items():
        print(f"{name:24s}{seconds:8.3f}")
    if report["ratios"]:
        print("\nratios of minima\n")
    for name, ratio in report["ratios"].items():
        print(f"{name:38s}{ratio:6.2f}")


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.worker:
        from tools.layout_runs import worker

        answer(arguments.worker, lambda spec, device: worker(spec, device, progress))
        return 0
    report = measure(arguments)
    print_report(report)
    if arguments.json:
        partial = arguments.json + ".tmp"
        with open(partial, "w") as file:
            json.dump(report, file, indent=1)
        os.replace(partial, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
