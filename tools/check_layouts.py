"""Check that parallel layouts train a model as one process does that runs transformers' own model and torch's AdamW.

    python tools/check_layouts.py --tiny qwen3_vl --layouts tp2dp2,pp2dp2
    python tools/check_layouts.py --checkpoint CHECKPOINT_DIR --all --processes 8

Compares per-token log-probs and entropies, then of three clipped AdamW steps the loss, every gradient, the gradient
norm and every weight. Run it before a long job on a checkpoint, a machine or a library that is new. One process holds
the whole model in fp32 with gradients and AdamW's state: 16 bytes a weight, and half as much again on the way to the
file that the layouts compare with. Exit status: 0 all is well, 1 a difference is past the tolerance, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
from pathlib import Path

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from megavg.models.tiny_config import FAMILIES
from tools.layouts import Layout, read_layout
from tools.local_ranks import answer, progress, run_local

DEFAULT_LAYOUTS = ("tp2dp2", "pp2dp2", "tp2pp2", "pp4", "tp4", "tp2pp2dp2")
FIGURES = ("logprobs", "entropy", "loss", "gradients", "norm", "weights")
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}
_TIMEOUT = 7 * 86400.0  # seconds; a rank that hangs ends the others much sooner, as their collectives give up


def choose_layouts(named: str | None, all_of_them: bool, processes: int) -> list[Layout]:
    """The layouts to check: the small ones first, and of one size those with few stages (see ``measure``)."""
    if named is not None:
        layouts = list(dict.fromkeys(read_layout(part.strip()) for part in named.split(",")))
        for layout in layouts:
            if layout.num_processes > processes:
                raise ValueError(f"layout {layout} needs {layout.num_processes} processes, but --processes is "
                                 f"{processes}; raise it or leave the layout out")
    else:
        layouts = [layout for layout in map(read_layout, DEFAULT_LAYOUTS) if layout.num_processes <= processes]
        if all_of_them or not layouts:
            sizes = range(1, processes + 1)
            layouts = [layout for layout in itertools.starmap(Layout, itertools.product(sizes, repeat=3))
                       if processes % layout.num_processes == 0]
    return sorted(layouts, key=lambda layout: (layout.num_processes, layout.pp))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", metavar="DIR", help="the model to check, in Hugging Face format")
    model.add_argument("--tiny", choices=list(FAMILIES), help="check a small random model of this family")
    model.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--tied", action="store_true", help="the tiny model shares its embedding with its head")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--layouts", metavar="A,B", help="which, such as tp2pp2dp2,pp4 (default: those of "
                       f"{', '.join(DEFAULT_LAYOUTS)} that fit --processes). Data parallelism must divide 8, the "
                       "number of examples")
    which.add_argument("--all", action="store_true", help="every layout whose size divides --processes, that of one "
                       "process too; those that the model cannot have are listed as refused")
    parser.add_argument("--processes", type=int, default=4, help="at most so many; GPUs, where there are some "
                        "(default: 4)")
    parser.add_argument("--recompute", choices=["off", "on", "both"], default="off",
                        help="recomputation of activations (default: off)")
    parser.add_argument("--frozen-tower", choices=["off", "on", "both"], default="off",
                        help="train all but the vision tower (default: off)")
    parser.add_argument("--dtype", choices=list(TOLERANCES), default="float32", help="of the layouts; the one process "
                        "computes in fp32 from weights rounded to it (default: float32)")
    parser.add_argument("--tolerance", type=float, help="largest difference: log-probs and entropies in nats, "
                        "the rest relative, a gradient or weight to the largest of its tensor (default: 1e-5). With "
                        "bfloat16 only the loss is judged (default: 1e-2)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    arguments = parser.parse_args(argv)
    if arguments.worker is None:
        try:
            _complete(arguments)
        except ValueError as error:
            parser.error(str(error))
    return arguments


def _complete(arguments: argparse.Namespace) -> None:
    """Check the arguments against each other and this machine, and fill in what follows from them."""
    if arguments.tied and not arguments.tiny:
        raise ValueError("--tied is for --tiny; a checkpoint's config.json says whether it ties its matrices")
    if arguments.checkpoint and not os.path.isfile(os.path.join(arguments.checkpoint, "config.json")):
        raise ValueError(f"--checkpoint {arguments.checkpoint} has no config.json; name a folder in Hugging Face "
                         "format")
    if arguments.processes < 1:
        raise ValueError(f"--processes {arguments.processes} must be at least 1")
    arguments.tolerance = TOLERANCES[arguments.dtype] if arguments.tolerance is None else arguments.tolerance
    arguments.are_named = arguments.layouts is not None
    arguments.layouts = choose_layouts(arguments.layouts, arguments.all, arguments.processes)
    needed, gpus = max(layout.num_processes for layout in arguments.layouts), _num_gpus()
    if 0 < gpus < needed:
        raise ValueError(f"{needed} processes need as many GPUs, and this machine has {gpus}; lower --processes to "
                         f"{gpus}, or set DS_ACCELERATOR=cpu in the environment")


def _num_gpus() -> int:
    """GPUs that would be used; 0 where the check runs on CPU."""
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def measure_all(arguments: argparse.Namespace, folder: str) -> list[dict]:
    """One row per layout, recomputation and frozen tower."""
    choices = {"off": [False], "on": [True], "both": [False, True]}
    frozen, recompute = choices[arguments.frozen_tower], choices[arguments.recompute]
    checkpoint = os.path.abspath(arguments.checkpoint or os.path.join(folder, "tiny"))
    common = {"checkpoint": checkpoint, "dtype": arguments.dtype, "folder": folder}
    _say(f"one process: transformers' model of {arguments.checkpoint or 'a tiny ' + arguments.tiny}")
    (refused,) = run_local(1, __file__, common | {"tiny": arguments.tiny, "tied": arguments.tied, "frozen": frozen},
                           _TIMEOUT)
    if refused:
        raise ValueError(refused)
    rows = []
    for world, layouts in itertools.groupby(arguments.layouts, key=lambda layout: layout.num_processes):
        cases = [{"layout": layout, "recompute": again, "frozen_tower": freeze}
                 for layout, freeze, again in itertools.product(layouts, frozen, recompute)]
        _say(f"{world} process{'es' if world > 1 else ''}: {len(cases)} to measure")
        rows += run_local(world, __file__, common | {"cases": cases}, _TIMEOUT)[0]
    return rows


def work(task: dict, device) -> str | list[dict]:
    """What a measuring process does: makes the references, or measures the cases of its task.

    Returns the rows; of a reference nothing, or why the checkpoint is refused.
    """
    import torch

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["WORLD_SIZE"])))
    dtype = getattr(torch, task["dtype"])
    if "cases" in task:
        return _measure_cases(task, device, dtype)
    from tools.layout_gate import make_tiny, run_reference

    try:
        if task["tiny"]:
            make_tiny(Path(task["checkpoint"]), task["tiny"], task["tied"])
        for frozen in task["frozen"]:
            torch.save(run_reference(task["checkpoint"], device, dtype, frozen), _reference_file(task, frozen))
    except ValueError as error:
        return str(error)
    return ""


def _measure_cases(task: dict, device, dtype) -> list[dict]:
    import torch

    from megavg.parallel.mcore import make_context
    from megavg.protocols.options import StageOptions
    from tools.layout_gate import measure

    rows, references = [], {}
    for case in task["cases"]:
        layout, frozen = Layout(*case["layout"]), case["frozen_tower"]
        if frozen not in references:
            references[frozen] = torch.load(_reference_file(task, frozen), mmap=True)
        found = measure(task["checkpoint"], references[frozen], make_context(layout.tp, layout.pp, device), dtype,
                        StageOptions(recompute=case["recompute"], freeze_vision_tower=frozen))
        rows.append({**case, "layout": str(layout), **found})
        progress("  ".join(_cells(rows[-1])))
    return rows


def _reference_file(task: dict, frozen: bool) -> str:
    return os.path.join(task["folder"], f"reference-{'frozen' if frozen else 'all'}.pt")


def judge(row: dict, dtype: str, tolerance: float) -> bool:
    """Whether a measured row's differences are small enough."""
    judged = FIGURES if dtype == "float32" else ("loss",)
    return all(row[key] <= tolerance for key in judged)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _cells(row: dict) -> list[str]:
    cells = [f"{row['layout']:10s}", f"{'on' if row['recompute'] else 'off':9s}",
             f"{'on' if row['frozen_tower'] else 'off':6s}"]
    if "refused" in row:
        return [*cells, f"refused: {row['refused']}"]
    return cells + [f"{row[key]:9.1e}" for key in FIGURES]


def report(rows: list[dict], arguments: argparse.Namespace) -> bool:
    """Print the table and the verdict; returns whether all is well."""
    is_well = any("ok" in row for row in rows)
    print("  ".join([f"{'layout':10s}", f"{'recompute':9s}", f"{'frozen':6s}", *(f"{key:>9s}" for key in FIGURES)]))
    for row in rows:
        if "refused" in row:
            is_well &= not arguments.are_named
            print("  ".join(_cells(row)))
            continue
        is_well &= row["ok"]
        print("  ".join([*_cells(row), "ok" if row["ok"] else "PAST THE TOLERANCE"]))
        if not row["ok"]:
            print(f"{'':10s}  worst gradient: {row['worst_gradient']}; worst weight: {row['worst_weight']}")
    judged = "" if arguments.dtype == "float32" else "; only the loss is judged"
    print(f"{'PASS' if is_well else 'FAIL'}: {arguments.dtype}, tolerance {arguments.tolerance:g}{judged}")
    return is_well


def write_json(path: str, rows: list[dict], arguments: argparse.Namespace) -> None:
    model = {"checkpoint": arguments.checkpoint} if arguments.checkpoint else {"tiny": arguments.tiny,
                                                                              "tied": arguments.tied}
    finite = [{key: None if isinstance(value, float) and not math.isfinite(value) else value
               for key, value in row.items()} for row in rows]
    partial = path + ".tmp"
    with open(partial, "w") as file:
        json.dump({**model, "dtype": arguments.dtype, "tolerance": arguments.tolerance, "rows": finite}, file, indent=1)
    os.replace(partial, path)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.worker:
        answer(arguments.worker, work)
        return 0
    try:
        with tempfile.TemporaryDirectory(prefix="check_layouts-") as folder:
            rows = measure_all(arguments, folder)
    except ValueError as error:
        print(f"check_layouts: {error}", file=sys.stderr)
        return 2
    for row in rows:
        if "refused" not in row:
            row["ok"] = judge(row, arguments.dtype, arguments.tolerance)
    is_well = report(rows, arguments)
    if arguments.json:
        write_json(arguments.json, rows, arguments)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
