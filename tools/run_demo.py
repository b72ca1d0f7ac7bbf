"""Run the whole job on a small scale: make a checkpoint and shards, warm up, reinforce, evaluate, draw.

Ends with a table of figures before and after reinforcement learning, ``summary.json`` and ``boxes.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_OUT = "runs/demo"
SETS = ("held_out_scenes", "real_crops", "real_screens")
FIGURES = ("acc_at_50", "mean_iou", "parse_rate")
WRITTEN = ("checkpoint", "data", "warmup", "rl", "boxes.png", "summary.json")
IMAGE_SIDE = 96  # pixels; the side of a scene and of a crop after its resize
PICTURES_PER_SET = {"held_out_scenes": 8, "real_crops": 4}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a tiny Qwen3-VL on drawn scenes and real screenshots.",
                                     epilog="Further arguments override options of examples/demo.yaml, such as "
                                            "algorithm.name=ecvgpo parallel.tensor_model_parallel_size=2")
    parser.add_argument("--num-ranks", type=int, default=2, help="processes of a training (default 2)")
    parser.add_argument("--family", default="qwen3_vl", choices=["qwen3_vl", "qwen2_5_vl"])
    parser.add_argument("--warmup-steps", type=int, help="instead of examples/demo_warmup.yaml's")
    parser.add_argument("--num-scenes", type=int, default=6144, help="drawn training scenes (default 6144)")
    parser.add_argument("--out", default=DEFAULT_OUT, help=f"folder for everything (default {DEFAULT_OUT})")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def run(*command: str) -> None:
    """Run a command from the repository root with its output shown; end the demo when it fails."""
    print(f"$ {' '.join(command)}", flush=True)
    finished = subprocess.run(command, cwd=ROOT)
    if finished.returncode:
        sys.exit(f"run_demo: the command above failed with exit code {finished.returncode}")


def choose_ranks(wanted: int) -> int:
    """As many ranks as wanted on the CPU; at most one per GPU where there are GPUs."""
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed warns that it found no accelerator
        return wanted
    if torch.cuda.device_count() < wanted:
        print(f"{torch.cuda.device_count()} GPU(s): training on as many ranks instead of {wanted}", flush=True)
    return min(wanted, torch.cuda.device_count())


def tool(name: str, *arguments: str) -> None:
    run(sys.executable, f"tools/{name}.py", *arguments)


def train(config: str, out: Path, num_ranks: int, *overrides: str) -> None:
    """One training through the launcher; the paths of ``config`` are moved to ``out``."""
    import yaml

    tree = yaml.safe_load((ROOT / config).read_text())
    moved = {"model.path": tree["model"]["path"], "data.shards": tree["data"]["shards"],
             "trainer.output_dir": tree["trainer"]["output_dir"]}
    if "evaluation" in tree:
        moved["evaluation.sets"] = tree["evaluation"]["sets"]
    paths = [f"{key}={json.dumps(value).replace(DEFAULT_OUT, str(out))}" for key, value in moved.items()]
    launcher = str(Path(sys.executable).parent / "deepspeed")
    run(launcher, "--num_gpus", str(num_ranks), "--log_level", "error", "megavg/train.py", "--config", config,
        *(paths if str(out) != DEFAULT_OUT else ()), "trainer.overwrite=true", *overrides)


def make_checkpoint(out: Path, family: str) -> None:
    tool("make_tiny_checkpoint", "--family", family, "--out", str(out / "checkpoint"), "--overwrite",
         "--min-pixels", str(64 * 64), "--max-pixels", str(192 * 192), "--initializer-range", "0.05")


def make_data(data: Path, num_scenes: int) -> None:
    annotations = ["--annotations", "examples/data/webdocs_gui/annotations.jsonl"]
    side = f"{IMAGE_SIDE}x{IMAGE_SIDE}"
    crops = ["--crop", f"{2 * IMAGE_SIDE}x{2 * IMAGE_SIDE}", "--resize", side]
    scenes = ["--format", "scenes", "--image-size", str(IMAGE_SIDE), "--shapes", "circle,square,triangle",
              "--colours", "red,green,blue,yellow,orange,purple"]
    tool("make_shards", *scenes, "--count", str(num_scenes), "--seed", "1", "--out", str(data / "scenes"))
    tool("make_shards", *scenes, "--count", "256", "--seed", "2", "--out", str(data / "held_out_scenes"))
    tool("make_shards", *scenes, "--count", "128", "--seed", "3", "--out", str(data / "validation_scenes"))
    screens = ["--format", "jsonl", *annotations]
    tool("make_shards", *screens, "--split", "train", *crops, "--out", str(data / "crops"))
    tool("make_shards", *screens, "--split", "test", *crops, "--out", str(data / "held_out_crops"))
    tool("make_shards", *screens, "--split", "test", "--out", str(data / "held_out_screens"))


def evaluation(out: Path, name: str, when: str) -> dict:
    """The first or last evaluation of a set in the reinforcement-learning run."""
    files = sorted((ROOT / out / "rl" / "evaluation").glob(f"{name}-*.json"))
    return json.loads(files[0 if when == "before" else -1].read_text())


def summarise(out: Path, seconds: dict[str, float]) -> dict:
    """The content of summary.json."""
    run_facts = json.loads((ROOT / out / "rl" / "run.json").read_text())
    summary = {name: {when: {figure: evaluation(out, name, when)[figure] for figure in FIGURES}
                      for when in ("before", "after")} for name in SETS}
    return summary | {
        "seconds": {phase: round(value, 1) for phase, value in seconds.items()},
        "algorithm": run_facts["algorithm"],
        "layout": run_facts["layout"],
    }


def draw(out: Path) -> None:
    """One picture: the same held-out samples before and after, true and predicted boxes."""
    from itertools import islice

    from megavg.data.shards import iterate_all
    from megavg.evaluation.draw import draw_boxes, panel

    tiles = []
    for name, count in PICTURES_PER_SET.items():
        shards = [str(ROOT / out / "data" / name.replace("real_", "held_out_"))]
        samples = list(islice(iterate_all(shards), count))
        rows = {when: {row["key"]: row for row in evaluation(out, name, when)["rows"]} for when in ("before", "after")}
        for chunk in (samples[i:i + 4] for i in range(0, len(samples), 4)):
            for when in ("before", "after"):
                for sample in chunk:
                    row = rows[when][sample.key]
                    tiles.append(draw_boxes(sample.image, row["true_boxes_px"], row["predicted_boxes_px"],
                                            f"{when} RL: {sample.expression}"))
    panel(tiles, 4, "Held-out samples before and after reinforcement learning").save(ROOT / out / "boxes.png")


def print_table(summary: dict) -> None:
    print(f"\n{'':18}{'Acc@0.5':>18}{'mean IoU':>20}{'answers that parse':>22}")
    for name in SETS:
        before, after = summary[name]["before"], summary[name]["after"]
        cells = [f"{before[figure]:.3f} -> {after[figure]:.3f}" for figure in FIGURES]
        print(f"{name:18}{cells[0]:>18}{cells[1]:>20}{cells[2]:>22}")
    print(f"\n{summary['algorithm']}, {summary['layout']}; seconds: "
          + ", ".join(f"{phase} {value:.0f}" for phase, value in summary["seconds"].items()))


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    seconds: dict[str, float] = {}
    started = time.monotonic()

    def lap(phase: str) -> None:
        nonlocal started
        seconds[phase], started = time.monotonic() - started, time.monotonic()

    out = Path(arguments.out)
    num_ranks = choose_ranks(arguments.num_ranks)
    for name in WRITTEN:
        path = ROOT / out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    make_checkpoint(out, arguments.family)
    make_data(out / "data", arguments.num_scenes)
    lap("data")
    warmup = [f"trainer.num_steps={arguments.warmup_steps}"] if arguments.warmup_steps else []
    train("examples/demo_warmup.yaml", out, num_ranks, *warmup)
    lap("warmup")
    train("examples/demo.yaml", out, num_ranks, *arguments.overrides)
    lap("rl")
    draw(out)
    summary = summarise(out, seconds)
    partial = ROOT / out / "summary.json.tmp"
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(partial, ROOT / out / "summary.json")
    print_table(summary)
    print(f"figures: {out}/summary.json   picture: {out}/boxes.png   curves: tensorboard --logdir {out}/rl/tensorboard")
    return 0


if __name__ == "__main__":
    sys.exit(main())
