"""Which checkpoints stay."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megavg.checkpoint.parts import whole
from megavg.checkpoint.train_state import Checkpoints, Snapshot, checkpoints
from tests.distributed import run_ranks


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
    (made.folder / "step-000100").rename(made.folder / "step-000100.replaced")
    assert made.newest_whole(print).name == "step-000100"


def test_what_is_a_link_or_somebody_else_s_is_let_be(store, tmp_path):
    """A checkpoint that was moved to another disk and linked to, and copies beside those of the run."""
    made = store(keep_last=1)
    save(made, 100)
    (made.folder / "step-000100").rename(tmp_path / "archive")
    (made.folder / "step-000100").symlink_to(tmp_path / "archive")
    others = ["step-000100.old", "step-best.tmp", "step-000050.bak"]
    for name in others:
        shutil.copytree(tmp_path / "archive", made.folder / name)
    (made.folder / "step-000200.tmp").write_text("no folder")
    save(made, 200, 300)
    assert made.newest_whole(print).name == "step-000300"
    assert sorted(path.name for path in made.folder.iterdir()) == sorted([*others, "step-000300"])
    assert (tmp_path / "archive" / "manifest.json").exists()


def listed_on(folder: str) -> list[str]:
    """What a rank takes for the checkpoints; to rank 1 the file system shows none."""
    from megavg.checkpoint import train_state
    from megavg.parallel.mcore import make_context

    context = make_context(1, 1, torch.device("cpu"))
    made = Checkpoints(Path(folder) / "checkpoints", context)
    made.save(Snapshot(7, {}, {}, "", Path(folder) / "model"), [])
    if context.rank:
        train_state.checkpoints = lambda folder: []
    return [path.name for path in made.listed()] + [made.newest_whole(print).name]


def test_all_ranks_go_by_what_the_first_one_sees(tmp_path):
    (tmp_path / "model").mkdir()
    assert run_ranks(2, listed_on, str(tmp_path)) == [["step-000007", "step-000007"]] * 2


def draw_again(folder: str) -> tuple[list, list]:
    """Numbers that a rank draws after a save, and after going back to it."""
    import random

    import numpy as np

    from megavg.parallel.mcore import make_context

    def drawn() -> list:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def seed(number: int) -> None:
        for each in (random.seed, np.random.seed, torch.manual_seed):
            each(number)

    context = make_context(1, 1, torch.device("cpu"))
    made = Checkpoints(Path(folder) / "checkpoints", context)
    seed(context.rank)
    drawn()
    made.save(Snapshot(1, {}, {}, "", Path(folder) / "model"), [])
    first = drawn()
    seed(99)
    made.restore_rng(made.newest_whole(print))
    return first, drawn()


def test_every_rank_goes_on_with_its_own_generators(tmp_path):
    (tmp_path / "model").mkdir()
    found = run_ranks(2, draw_again, str(tmp_path))
    assert all(first == again for first, again in found) and found[0] != found[1]
