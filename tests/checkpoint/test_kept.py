"""Which checkpoints stay."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megavg.checkpoint.parts import whole
from megavg.checkpoint.train_state import Checkpoints, Snapshot, checkpoints


@pytest.fixture
def store(tmp_path):
    """``store(**options)`` -> checkpoints of one process in the folder "checkpoints"."""
    (tmp_path / "model").mkdir()
    alone = SimpleNamespace(rank=0, world_size=1)
    return lambda **options: Checkpoints(tmp_path / "checkpoints", alone, **options)


def save(store: Checkpoints, *steps: int) -> None:
    tensor = torch.zeros(3)
    for step in steps:
        store.save(Snapshot(step, {}, {}, "", store.folder.parent / "model"),
                   [whole("a", (3,), torch.float32, lambda: tensor)])


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def test_the_last_and_the_multiples(store):
    made = store(keep_last=2, keep_every=30)
    save(made, *range(10, 101, 10))
    assert names(made.folder) == [f"step-{step:06d}" for step in (30, 60, 90, 100)]


def test_a_damaged_checkpoint_of_a_later_step_costs_no_whole_one(store):
    """A run that passed over step 300 saves 250 and keeps one: 250 stays, and is gone on from."""
    made = store(keep_last=1)
    save(made, 200, 300, 250)
    assert names(made.folder) == ["step-000250"] and (made.folder / "step-000300.passed").is_dir()
    assert made.newest_whole(print).name == "step-000250"


def test_only_folders_named_by_a_step_are_checkpoints(store):
    made = store(keep_last=1, keep_every=100)
    save(made, 100)
    for name in ("step-000100-mine", "step-best"):
        shutil.copytree(made.folder / "step-000100", made.folder / name)
    save(made, 150, 200, 999_950, 1_000_050)
    assert sorted(path.name for path in made.folder.iterdir()) == [
        "step-000100", "step-000100-mine", "step-000200", "step-1000050", "step-best"]
    assert made.newest_whole(print).name == "step-1000050"


def test_a_kill_between_two_renames_loses_nothing(store):
    """The old folder was out of the way and the new one not yet in its place."""
    made = store()
    save(made, 100)
    (made.folder / "step-000100").rename(made.folder / "step-000100.old")
    assert made.newest_whole(print).name == "step-000100"
