"""What an earlier process left in a run's folder: gone on from, replaced with a word, or refused, never in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megavg.protocols.config import apply_overrides
from megavg.trainer.config import resolve, save_resolved
from megavg.trainer.run_folder import RunFolder
from tests.tiny_runs import run_tree


@pytest.fixture
def left(tmp_path, scene_shards):
    """``left(steps, *overrides)``: what a run that was killed without a checkpoint left; returns its configuration."""
    def make(steps: int, *overrides: str) -> dict:
        tree = run_tree(tmp_path / "model", scene_shards(16), tmp_path / "run", "trainer.num_steps=9", *overrides)
        folder = tmp_path / "run"
        for name in ("evaluation", "pictures", "heat_maps"):
            (folder / name).mkdir(parents=True)
        save_resolved(resolve(tree), folder / "config.yaml")
        lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, steps + 1)]
        (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "lo']))
        for name in ("evaluation/scenes-{:06d}.json", "pictures/eval_scenes-{:06d}.png", "heat_maps/step-{:06d}.html"):
            for step in (0, 2, 4):
                (folder / name.format(step)).write_text("x")
        (folder / "pictures" / "mine.png").write_text("x")
        return tree
    return make


def opened(tree: dict, *overrides: str) -> RunFolder:
    return RunFolder(resolve(apply_overrides(tree, ["trainer.resume=auto", *overrides])))


def names(folder: Path) -> list[str]:
    return sorted(path.name for name in ("evaluation", "pictures", "heat_maps") for path in (folder / name).iterdir())


def test_the_same_run_starts_anew_and_says_so(left):
    folder, told = opened(left(3)), []
    folder.check()
    folder.check_anew(told.append)
    assert told == [f"{folder.path} holds 3 steps of this run, but no checkpoint (trainer.save_every=0): it starts anew"]
    folder.prepare(0, anew=True)
    assert names(folder.path) == ["mine.png"] and not (folder.path / "metrics.jsonl").exists()


def test_from_another_run_s_checkpoint_nothing_stays_either(left, tmp_path):
    folder = opened(left(3), f"trainer.resume={tmp_path}/other/checkpoints/step-000002")
    folder.prepare(2, anew=True)
    assert names(folder.path) == ["mine.png"] and not (folder.path / "metrics.jsonl").exists()


def test_steps_that_are_taken_again_leave_nothing_behind(left):
    folder = opened(left(3))
    folder.prepare(2, anew=False)
    assert names(folder.path) == ["eval_scenes-000000.png", "eval_scenes-000002.png", "mine.png", "scenes-000000.json",
                                  "scenes-000002.json", "step-000000.html", "step-000002.html"]


@pytest.mark.parametrize("overrides, words", [
    (["optimizer.lr=0.5"], r"3 steps of a run with other options \(optimizer.lr: 0.001, now 0.5\), and no checkpoint"),
    (["algorithm.name=grpo"], "algorithm.name: 'ecvgpo', now 'grpo'"), (["trainer.seed=4"], "trainer.seed: 0, now 4"),
    (["rewards=[{name: iou}]"], "rewards: .*format.*, now .*iou"),
])
def test_another_run_is_not_replaced(left, overrides, words):
    tree = left(3)
    with pytest.raises(ValueError, match=words) as caught:
        opened(tree, *overrides).check_anew(print)
    assert "trainer.resume=false trainer.overwrite=true" in str(caught.value)


def test_what_does_not_change_the_run_may_differ(left):
    told = []
    opened(left(3), "parallel.timeout_minutes=5", "trainer.micro_batch_size=1", "trainer.save_every=3",
           "rollout.prompts_per_pass=1", "data.num_workers=2", "trainer.num_steps=30").check_anew(told.append)
    assert len(told) == 1


def test_a_finished_run_is_not_replaced(left, tmp_path):
    """Also where it ended early at its goal, or more steps are asked for; one that was killed at its end is."""
    tree, told = left(5), []
    run = tmp_path / "run" / "run.json"
    run.write_text(json.dumps({"finished": False}))
    opened(tree, "trainer.num_steps=5").check_anew(told.append)
    assert len(told) == 1
    run.write_text(json.dumps({"finished": True}))
    for steps in (5, 9, 12):
        with pytest.raises(ValueError, match="holds a finished run of 5 steps, and no checkpoint to go on from"):
            opened(tree, f"trainer.num_steps={steps}").check_anew(print)


def test_a_job_replaces_what_others_left_and_goes_on_with_what_it_made(left, monkeypatch):
    """Slurm starts a job again with the same words."""
    tree = left(3)

    def start(job: str, *overrides: str) -> RunFolder:
        monkeypatch.setenv("MEGAVG_JOB", job)
        return RunFolder(resolve(apply_overrides(tree, list(overrides))))

    first = start("c-1", "trainer.overwrite=true")
    first.check()
    assert first.config.trainer.overwrite and not first.config.trainer.resume
    first.prepare(0, anew=True)
    (first.path / "metrics.jsonl").write_text("")
    for again in (start("c-1", "trainer.overwrite=true"), start("c-1")):
        again.check()
        assert (again.config.trainer.overwrite, again.config.trainer.resume) == (False, "auto")
    assert start("c-2", "trainer.overwrite=true").config.trainer.overwrite
    with pytest.raises(ValueError, match="already holds a run"):
        start("c-2").check()
    monkeypatch.delenv("MEGAVG_JOB")
    assert opened(tree, "trainer.resume=false", "trainer.overwrite=true").config.trainer.overwrite


def test_a_new_folder_and_one_that_is_to_be_replaced_are_no_matter(left, tmp_path):
    tree = left(3)
    opened(tree, f"trainer.output_dir={tmp_path / 'new'}").check_anew(lambda text: pytest.fail(text))
    replaced = RunFolder(resolve(apply_overrides(tree, ["trainer.overwrite=true", "trainer.seed=4"])))
    replaced.check_anew(lambda text: pytest.fail(text))
    replaced.prepare(0, anew=True)
    assert [path.name for path in replaced.path.iterdir()] == ["config.yaml"]
