"""A run that was killed goes on as if nothing had happened, in a new process."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from megavg.checkpoint.manifest import read_manifest
from megavg.checkpoint.train_state import checkpoints as checkpoints_of
from megavg.checkpoint.train_state import read_trainer_state
from tests.distributed import run_ranks
from tests.tiny_runs import read_metrics, train, training_lines, without_times
from tests.trainer.conftest import CLOSED_LOOP


def resume_runs(killed: dict, finished: dict, refused: list[tuple[dict, str]]) -> None:
    train(killed)
    train(finished)
    for tree, message in refused:
        with pytest.raises(ValueError, match=message):
            train(tree)


@pytest.fixture(scope="module")
def resumed(data_parallel, grpo_tree, warm_up, tmp_path_factory):
    """Folder with the killed run, gone on with in new processes, and what stood in its metrics before."""
    folder = tmp_path_factory.mktemp("resumed")
    shutil.copytree(data_parallel / "killed", folder / "killed")
    shutil.copytree(data_parallel / "uninterrupted", folder / "finished")
    before = (folder / "killed" / "metrics.jsonl").read_text()
    with (folder / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 0.')  # killed while it wrote
    unfinished = folder / "killed" / "checkpoints" / "step-000004.tmp"
    shutil.copytree(folder / "killed" / "checkpoints" / "step-000003", unfinished)
    (folder / "finished" / "evaluation" / "seen-000006.json").unlink()  # killed after the last checkpoint
    lines = (folder / "finished" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "finished" / "metrics.jsonl").write_text("".join(lines[:-1]))

    def again(name, *overrides):
        return grpo_tree(folder / name, *CLOSED_LOOP, "trainer.resume=true", *overrides)

    run_ranks(2, resume_runs, again("killed", "trainer.save_every=3"), again("finished", "trainer.save_every=2"), [
        (grpo_tree(folder / "killed"), "already holds a run; set trainer.resume=true to go on with it, "
                                       "trainer.overwrite=true to replace it, or choose another trainer.output_dir"),
        (again("killed", "algorithm={name: grpo}"), "was written by algorithm ecvgpo.two_stage.dapo, this run is grpo; choose"),
        (again("killed", "trainer.seed=7"), "belongs to another order of samples .*seed: saved 0, now 7"),
        (grpo_tree(folder / "new", "data.prompts_per_step=5"),
         "data.prompts_per_step=5 is not divisible by the data-parallel size 2 of TP1 x PP1 x DP2; change "
         "data.prompts_per_step or the number of processes"),
        (grpo_tree(warm_up, "trainer.overwrite=true"), "trainer.overwrite=true would remove .*hf, which this run"),
    ])
    return folder, before


def test_what_is_refused_leaves_no_trace(resumed, warm_up):
    assert not (resumed[0] / "new").exists() and (warm_up / "hf" / "model.safetensors").exists()


def test_the_killed_run_stopped_in_the_middle(data_parallel, resumed):
    lines = [json.loads(line) for line in resumed[1].splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [path.name for path in checkpoints_of(data_parallel / "killed" / "checkpoints")] == ["step-000003"]


def test_metrics_are_those_of_the_uninterrupted_run(data_parallel, resumed):
    expected = [without_times(line) for line in read_metrics(data_parallel / "uninterrupted")]
    assert [without_times(line) for line in read_metrics(resumed[0] / "killed")] == expected
    alphas = [line["ecvgpo/alpha"] for line in expected if "loss" in line]
    assert len(set(alphas)) == 6, "the closed loop moved at every step, so its state mattered"
    assert any(line["resampling/draws"] > 1 for line in expected if "loss" in line), "so did the place in the data"
    assert expected[-2]["two_stage/peak_share"] < 1, "the peak was before, so its memory mattered"


def test_no_step_is_written_twice(resumed):
    for name in ("killed", "finished"):
        lines = [(line["step"], "loss" in line) for line in read_metrics(resumed[0] / name)]
        assert len(lines) == len(set(lines))
        assert lines == [(1, True), (2, True), (3, True), (3, False), (4, True), (5, True), (6, True), (6, False)]


def test_weights_are_bit_equal(data_parallel, resumed, warm_up):
    from safetensors.torch import load_file

    expected, found, start = (load_file(folder / "hf" / "model.safetensors") for folder in (
        data_parallel / "uninterrupted", resumed[0] / "killed", warm_up))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(not torch.equal(expected[name], start[name]) for name in expected)


def test_the_last_checkpoints_are_kept(data_parallel, resumed):
    folder = data_parallel / "uninterrupted" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000004", "step-000006"]
    state = read_trainer_state(folder / "step-000006")
    assert state["step"] == 6 and read_manifest(folder / "step-000006")["layout"] == "TP1 x PP1 x DP2"
    assert state["algorithm"]["name"] == "ecvgpo+two_stage+dapo" and -0.5 <= state["algorithm"]["alpha"] <= 0.5
    kept = checkpoints_of(resumed[0] / "killed" / "checkpoints")
    assert [path.name for path in kept] == ["step-000003", "step-000006"]


def test_an_unfinished_checkpoint_is_ignored_and_cleared_away(resumed):
    assert not (resumed[0] / "killed" / "checkpoints" / "step-000004.tmp").exists()


def test_an_evaluation_that_the_kill_prevented_is_made_up(data_parallel, resumed):
    """The finished run had its last checkpoint, but not its last evaluation."""
    assert len(training_lines(resumed[0] / "finished")) == 6
    found, expected = (json.loads((folder / "evaluation" / "seen-000006.json").read_text())
                       for folder in (resumed[0] / "finished", data_parallel / "uninterrupted"))
    assert found == expected
