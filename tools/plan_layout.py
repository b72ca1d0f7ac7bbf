"""Choose a parallel layout for a model and a number of GPUs: predicted bytes per GPU of each, and the options to paste.

    python tools/plan_layout.py --model Qwen2.5-VL-7B --gpus 8 --memory-gb 80
    python tools/plan_layout.py --model models/mine --gpus 16 --memory-gb 40 --reference --json plan.json
    python tools/plan_layout.py --table

Nothing is trained and no weights are read. Exit status: 0 a layout fits, 1 none does, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from megavg.protocols.plugin import nearest
from tools.plan_search import Machine, fewest_gpus, predictions, remedies
from tools.plan_work import Work

if TYPE_CHECKING:
    from tools.plan_memory import Prediction, Predictor

CARDS_GB = (24, 40, 80, 141)
MODELS = Path(__file__).with_name("plan_models.yaml")
_GB = 1e9
_COLUMNS = {"params": "parameters", "grads": "gradients", "optim": "optimiser", "copy": "rollout copy",
            "ref": "reference", "activ": "activations", "gather": "gathered", "head": "head tiles", "cache": "cache"}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    usual = Work()
    parser.add_argument("--gpus", type=int, metavar="N", help="of all nodes (default 8); with --table, the most "
                        "that are tried (default 128)")
    parser.add_argument("--model", metavar="DIR_OR_NAME", help="folder with a config.json, checkpoint of a run, or the "
                        "name of a released model, such as Qwen2.5-VL-7B")
    for name, default, what in (
            ("gpus-per-node", 8, "tensor parallelism stays among them"),
            ("image-patches", usual.image_patches, "of each prompt's image"),
            ("prompt-tokens", usual.prompt_tokens, "of each prompt, beside the image's"),
            ("answer-tokens", usual.answer_tokens, "rollout.max_new_tokens"),
            ("micro-batch", usual.micro_batch, "trainer.micro_batch_size"),
            ("group-size", usual.group_size, "rollout.group_size"),
            ("prompts-per-pass", usual.prompts_per_pass, "rollout.prompts_per_pass")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default {default})")
    parser.add_argument("--prompts-per-step", type=int, default=0, metavar="N", help="data.prompts_per_step (default: "
                        "the smallest multiple of the data-parallel size from 16 on)")
    parser.add_argument("--memory-gb", type=float, default=80, metavar="GB", help="of one GPU, 10^9 bytes (default 80)")
    parser.add_argument("--reserve", type=float, default=0.1, metavar="SHARE", help="of that, left for CUDA, "
                        "communication buffers and fragments (default 0.1)")
    parser.add_argument("--dtype", default=usual.dtype, choices=["float32", "bfloat16"])
    parser.add_argument("--reference", action="store_true", help="keep a frozen copy of the starting model (KL)")
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction,
                        help="always or never; without either, where a layout does not fit without")
    parser.add_argument("--offload", action="store_true", help="gradients and optimiser in host memory")
    parser.add_argument("--freeze-vision-tower", action="store_true", help="train all but the vision tower")
    parser.add_argument("--table", action="store_true", help=f"fewest GPUs for each released model and cards of "
                        f"{', '.join(map(str, CARDS_GB))} GB, as Markdown")
    parser.add_argument("--json", metavar="FILE", help="write all figures there, in bytes")
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    arguments.gpus = (128 if arguments.table else 8) if arguments.gpus is None else arguments.gpus
    for name in ("gpus", "gpus_per_node", "image_patches", "answer_tokens", "micro_batch", "group_size",
                 "prompts_per_pass"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.prompt_tokens < 0 or arguments.prompts_per_step < 0:
        parser.error("--prompt-tokens and --prompts-per-step must not be negative")
    if arguments.memory_gb <= 0 or not 0 <= arguments.reserve < 1:
        parser.error("--memory-gb must be above 0 and --reserve in [0, 1)")
    if bool(arguments.model) == arguments.table:
        parser.error("give either --model or --table")
    if arguments.gpus > arguments.gpus_per_node and arguments.gpus % arguments.gpus_per_node:
        parser.error(f"--gpus={arguments.gpus} does not fill nodes of --gpus-per-node={arguments.gpus_per_node}")
    return arguments


def released() -> dict[str, dict]:
    """Hugging Face configurations of the released models by name, with only the sizes."""
    import yaml

    return yaml.safe_load(MODELS.read_text())["models"]


def configuration(source: str) -> dict:
    """The configuration of a folder, of a run's checkpoint, or of a released model.

    Raises:
        ValueError: there is no such folder, file or name.
    """
    folder = Path(source)
    if folder.is_dir():
        path = next((p for p in (folder / "config.json", folder / "model" / "config.json") if p.is_file()), None)
        if path is None:
            raise ValueError(f"{folder} holds no config.json; give a Hugging Face folder or a checkpoint of a run")
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error}); copy the model again") from error
    name = source.rsplit("/", 1)[-1].removesuffix("-Instruct").removesuffix("-Thinking")
    known = released()
    if name not in known:
        raise ValueError(f"--model={source} is neither a folder nor a released model{nearest(name, known)}; there are "
                         f"{', '.join(known)}")
    return {key: value for key, value in known[name].items() if key != "parameters"}


def predictor_of(source: str) -> Predictor:
    """What predicts the memory of a folder's or a released model."""
    found = configuration(source)
    from megavg.parallel.quiet import quieten

    quieten()
    from tools.plan_memory import Predictor, model_of

    return Predictor(model_of(found))


def work_of(arguments: argparse.Namespace) -> Work:
    """What the command line says of a step."""
    return Work(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Work) if f.name != "recompute"})


def machine_of(arguments: argparse.Namespace, memory_gb: float) -> Machine:
    return Machine(arguments.gpus, arguments.gpus_per_node, memory_gb * _GB * (1 - arguments.reserve))


def options_of(found: Prediction) -> list[str]:
    """The options of a training that the plan is for, as they are pasted behind ``--config``."""
    work, layout = found.work, found.layout
    options = [f"parallel.tensor_model_parallel_size={layout.tp}", f"parallel.pipeline_model_parallel_size={layout.pp}",
               f"parallel.recompute={str(work.recompute).lower()}"]
    if work.offload:
        options.append("parallel.zero.offload_optimizer=true")
    if work.freeze_vision_tower:
        options.append("model.freeze_vision_tower=true")
    return [*options, f"model.dtype={work.dtype}", f"trainer.micro_batch_size={work.micro_batch}",
            f"data.prompts_per_step={work.prompts(layout.dp)}", f"rollout.group_size={work.group_size}",
            f"rollout.prompts_per_pass={work.prompts_per_pass}", f"rollout.max_new_tokens={work.answer_tokens}"]


def bubble(found: Prediction) -> float:
    """The share of an update in which a stage idles."""
    idle = found.layout.pp - 1
    return idle / (found.work.num_micro_batches(found.layout.dp) + idle)


def print_plan(found: list[Prediction], machine: Machine, arguments: argparse.Namespace) -> None:
    print(f"GB per GPU of the worst stage, predicted; {machine.budget / _GB:.1f} of {arguments.memory_gb:g} GB may be "
          f"taken\n\n{'layout':12s}{'recompute':>10s}{'bubble':>8s}{'stage':>6s}"
          + "".join(f"{column:>8s}" for column in _COLUMNS) + f"{'total':>8s}  at")
    for plan in sorted(found, key=lambda plan: plan.total > machine.budget):
        print(f"{str(plan.layout):12s}{'yes' if plan.work.recompute else 'no':>10s}{bubble(plan):8.0%}{plan.stage:6d}"
              + "".join(f"{plan.kinds[kind] / _GB:8.2f}" for kind in _COLUMNS.values())
              + f"{plan.total / _GB:8.2f}  {plan.moment}{'' if plan.total <= machine.budget else ', does not fit'}")


def print_choice(chosen: Prediction, machine: Machine) -> None:
    print(f"\n{chosen.layout} fits with the least communication: data parallelism first, then tensor parallelism "
          f"inside a node, then pipeline stages. Paste behind --config:\n\n{' '.join(options_of(chosen))}")
    if chosen.host:
        per_node = min(machine.gpus, machine.gpus_per_node) * chosen.host
        print(f"\nHost memory for what is offloaded: {per_node / _GB:.0f} GB a node")


def print_remedies(found: list[tuple[str, Prediction | None]]) -> None:
    print("\nNo layout fits. What would:\n")
    for change, plan in found:
        print(f"{change}: " + ("not enough" if plan is None else
                               f"{plan.layout}{' with recompute' if plan.work.recompute else ''}, "
                               f"{plan.total / _GB:.1f} GB"))


def plan(arguments: argparse.Namespace) -> int:
    """Print the layouts of one model; the exit status.

    Raises:
        ValueError: the model is unknown, or allows no layout of so many GPUs at all.
    """
    predictor, work = predictor_of(arguments.model), work_of(arguments)
    machine, refused = machine_of(arguments, arguments.memory_gb), {}
    found = list(predictions(predictor, machine, work, arguments.recompute, refused))
    if not found:
        raise ValueError(f"no layout of {machine.gpus} GPUs is allowed; the first: {next(iter(refused.values()))}")
    print_plan(found, machine, arguments)
    chosen = next((each for each in found if each.total <= machine.budget), None)
    if arguments.json:
        write_json(arguments.json, machine, found, chosen, refused)
    if chosen is None:
        print_remedies(remedies(predictor, machine, work, arguments.recompute))
        return 1
    print_choice(chosen, machine)
    return 0


def write_json(path: str, machine: Machine, found: list[Prediction], chosen: Prediction | None,
               refused: dict[str, str]) -> None:
    """Write every figure, in bytes."""
    report = {"machine": dataclasses.asdict(machine), "chosen": chosen and str(chosen.layout),
              "options": chosen and options_of(chosen), "refused": refused,
              "layouts": [{**dataclasses.asdict(each), "layout": str(each.layout)} for each in found]}
    partial = f"{path}.tmp"
    with open(partial, "w") as file:
        json.dump(report, file, indent=1)
    os.replace(partial, path)


def cell(found: Prediction | None, most: int) -> str:
    """One cell of the table: GPUs and layout."""
    if found is None:
        return f"more than {most}"
    gpus = found.layout.num_processes
    return f"{gpus}: {found.layout if gpus > 1 else 'one'}{' r' if found.work.recompute else ''}"


def print_table(arguments: argparse.Namespace) -> None:
    """Fewest GPUs of each released model and card."""
    print("| model | " + " | ".join(f"{card} GB" for card in CARDS_GB) + " |\n|---" + "|---" * len(CARDS_GB) + "|")
    for name in released():
        predictor = predictor_of(name)
        found = [fewest_gpus(predictor, machine_of(arguments, card), work_of(arguments), arguments.recompute)
                 for card in CARDS_GB]
        print(f"| {name} | " + " | ".join(cell(each, arguments.gpus) for each in found) + " |", flush=True)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        if arguments.table:
            print_table(arguments)
            return 0
        return plan(arguments)
    except (ValueError, OSError) as error:
        print(f"plan_layout: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
