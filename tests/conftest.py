"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, so that no worker is left with one at the end; before all, those that mostly wait for a Slurm."""
    items.sort(key=lambda item: (not item.get_closest_marker("slow"), item.path.parent.name != "slurm"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """``checkpoints(family, **TinySpec fields)`` -> directory of a small random checkpoint, made once per session."""
    from megavg.models.tiny import TinySpec, make_tiny_checkpoint

    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def make(family: str, **fields) -> Path:
        name = "-".join([family, *(f"{key}={value}" for key, value in sorted(fields.items()))])
        if name not in made:
            sizes = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 3, "vision_depth": 3, "vocab_size": 515,
                     "min_pixels": 3136, "max_pixels": 16384}
            made[name] = make_tiny_checkpoint(folder / name, TinySpec(family, **{**sizes, **fields}))
        return made[name]

    return make


@pytest.fixture(scope="session")
def scene_shards(tmp_path_factory):
    """``scene_shards(count, seed)`` -> folder of webdataset shards of drawn scenes, made once per session."""
    from megavg.data.scenes import scenes
    from megavg.data.writer import write_shards

    folder, made = tmp_path_factory.mktemp("scenes"), {}

    def make(count: int = 32, seed: int = 0) -> Path:
        if (count, seed) not in made:
            out = folder / f"{count}-{seed}"
            write_shards(scenes(count, seed), str(out), "scenes", 16)
            made[count, seed] = out
        return made[count, seed]

    return make
