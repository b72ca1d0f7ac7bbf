"""SIGTERM and SIGUSR1, as Slurm sends them: the step is finished, all is kept, and the next start goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megavg.checkpoint.train_state import checkpoints as checkpoints_of
from tests.distributed import run_ranks
from tests.tiny_runs import read_metrics, run_tree
from tools.forked_ranks import Job
from tools.killed_runs import differences, train

STEPS = 3
# name -> (the signal, the rank that gets it, during what, the step after which the run leaves)
CASES = {
    "SIGTERM to the first rank in step 1": (signal.SIGTERM, 0, ("train_step", 0), 1),
    "SIGUSR1 to the other rank in the evaluation after step 1": (signal.SIGUSR1, 1, ("evaluate", 1), 2),
    "SIGUSR1 to the other rank in the last step": (signal.SIGUSR1, 1, ("train_step", 2), 3),
    "SIGTERM to the other rank in the last evaluation": (signal.SIGTERM, 1, ("evaluate", 3), None),
}


def enter(tree: dict, number: int = 0, rank: int = -1, when: tuple[str, int] = ("train_step", 0)) -> int:
    """The exit status of ``megavg/train.py``; ``rank`` gets the signal when its trainer begins ``when``."""
    from megavg.trainer.config import resolve
    from megavg.trainer.entry import run
    from megavg.trainer.trainer import Trainer

    def make(config) -> Trainer:
        trainer = Trainer(config)
        method = getattr(trainer, when[0])

        def observed(step: int, *args):
            if (dist.get_rank(), step) == (rank, when[1]):
                os.kill(os.getpid(), number)
            return method(step, *args)

        setattr(trainer, when[0], observed)
        return trainer

    return run(lambda: resolve(tree), make)


def interrupted(peace: dict, trees: dict[str, dict]) -> list[int]:
    before = signal.getsignal(signal.SIGTERM)
    codes = [enter(peace), *(enter(tree, *CASES[name][:3]) for name, tree in trees.items())]
    assert signal.getsignal(signal.SIGTERM) is before
    return codes


def enter_all(trees: list[dict]) -> list[int]:
    return [enter(tree) for tree in trees]


def left_behind(folder: Path) -> dict:
    marker = folder / "stopped.json"
    return {"steps": [(line["step"], "loss" in line) for line in read_metrics(folder)],
            "checkpoints": [path.name for path in checkpoints_of(folder / "checkpoints")],
            "marker": json.loads(marker.read_text()) if marker.exists() else None, "hf": (folder / "hf").exists()}


@pytest.fixture(scope="module")
def runs(checkpoints, scene_shards, tmp_path_factory) -> dict:
    """Folder of the run without a signal (``peace``) and one for each case, interrupted and gone on with."""
    folder, shards = tmp_path_factory.mktemp("signals"), scene_shards(16)

    def tree(name: str) -> dict:
        return run_tree(checkpoints("qwen3_vl", num_layers=2, vision_depth=2), shards, folder / name,
                        "algorithm={name: sft}", f"trainer.num_steps={STEPS}", "trainer.resume=auto",
                        "trainer.export_hf=true", f"evaluation.sets.seen=[{shards}]", "evaluation.every=1",
                        "evaluation.limit=2", "evaluation.pictures=0", "rollout.max_new_tokens=4")

    trees = {name: tree(name) for name in CASES}
    codes = run_ranks(2, interrupted, tree("peace"), trees)
    before = {name: left_behind(folder / name) for name in CASES}
    stopped = [tree for name, tree in trees.items() if CASES[name][3]]
    again = run_ranks(2, enter_all, stopped)
    return {"folder": folder, "codes": codes, "before": before, "again": again, "tree": tree}


def test_exit_status_is_75_on_every_rank_and_0_when_it_goes_on(runs):
    assert runs["codes"] == [[0, *(75 if step else 0 for *_, step in CASES.values())]] * 2
    assert runs["again"] == [[0] * 3] * 2


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][3]])
def test_the_step_is_finished_and_kept_and_the_marker_says_where(runs, name):
    number, _, _, step = CASES[name]
    steps = [line for done in range(1, step + 1) for line in ((done, True), (done, False))][:-1]
    saved, folder = f"step-{step:06d}", runs["folder"] / name / "checkpoints"
    assert runs["before"][name] == {
        "steps": steps, "checkpoints": [saved], "hf": False,
        "marker": {"signal": number.name, "step": step, "checkpoint": str(folder / saved)}}


@pytest.mark.parametrize("name", CASES)
def test_it_ends_as_the_run_without_a_signal(runs, name):
    """Metrics, evaluations and exported weights, bit for bit; checkpoints are only written on signals here."""
    peace, found = runs["folder"] / "peace", runs["folder"] / name
    assert differences(peace, found, checkpoints=False) == []
    assert left_behind(found)["marker"] is None and left_behind(found)["hf"]


def test_a_signal_after_the_last_step_changes_nothing(runs):
    name = next(name for name in CASES if not CASES[name][3])
    assert runs["before"][name] == {"steps": left_behind(runs["folder"] / "peace")["steps"], "checkpoints": [],
                                    "marker": None, "hf": True}


def test_a_signal_from_outside_ends_the_process_with_status_75(runs, tmp_path):
    """What the others do to themselves, done by another process to one that ``megavg/train.py``'s entry runs in."""
    import yaml

    tree = runs["tree"]("outside")
    tree["trainer"] |= {"num_steps": 500, "export_hf": False}
    tree["evaluation"] |= {"every": 0, "at_end": False}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "phase").write_text("")
    metrics = runs["folder"] / "outside" / "metrics.jsonl"
    with Job(tmp_path / "log", 1, train, str(tmp_path / "run.yaml"), str(tmp_path / "phase")) as job:
        deadline = time.monotonic() + 120
        while job.running and time.monotonic() < deadline and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.02)
        job.signal(0, signal.SIGUSR1)
        assert job.wait(120) == [75], job.last_lines()
    found = left_behind(runs["folder"] / "outside")
    assert 1 <= found["marker"]["step"] < 500 and found["steps"][-1] == (found["marker"]["step"], True)
    assert found["checkpoints"] == [f"step-{found['marker']['step']:06d}"]
