"""Short training runs on a tiny checkpoint and drawn scenes: their configuration, and reading what they left."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megavg.protocols.config import apply_overrides


def run_tree(checkpoint: Path, shards: Path, output_dir: Path, *overrides: str) -> dict:
    """The configuration of a run of 3 steps in fp32, changed by ``section.key=value`` overrides."""
    tree = {
        "model": {"path": str(checkpoint), "dtype": "float32"},
        "data": {"shards": [str(shards)], "prompts_per_step": 4, "prompt": "Locate {expression}.",
                 "check_frame": "off"},  # most models here are random
        "algorithm": {"name": "ecvgpo"},
        "rollout": {"group_size": 4, "max_new_tokens": 24},
        "rewards": [{"name": "iou"}, {"name": "format", "weight": 0.5}],
        "optimizer": {"lr": 1e-3},
        "evaluation": {"at_start": False, "at_end": False},
        "trainer": {"output_dir": str(output_dir), "num_steps": 3, "micro_batch_size": 4, "export_hf": False,
                    "tensorboard": False},
    }
    return apply_overrides(tree, list(overrides))


def train(tree: dict) -> None:
    """Run a training on this process, which is one rank of a world that is already there."""
    from megavg.trainer.config import resolve
    from megavg.trainer.trainer import Trainer

    Trainer(resolve(tree)).run()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def training_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of training steps, without those of evaluations."""
    return [line for line in read_metrics(folder) if "loss" in line]


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    """A line without what depends on the clock or on the process."""
    return {key: value for key, value in line.items()
            if not key.startswith(("time/", "memory/")) and key != "tokens_per_second"}


def all_finite(line: dict[str, Any]) -> bool:
    """Whether every number of a line is finite."""
    return all(math.isfinite(value) for value in line.values() if isinstance(value, (int, float)))
