"""The scripts of slurm/, submitted to a real Slurm of two nodes with a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from safetensors import safe_open

from tests.distributed import run_ranks
from tests.slurm.cluster import ROOT, rank_process
from tests.tiny_runs import read_metrics, run_tree, train, training_lines, without_times

pytestmark = pytest.mark.slow

STEPS = 20


def evaluate(tree: dict) -> None:
    """Run an evaluation on this process, which is one rank of a world that is already there."""
    from megavg.trainer.evaluate_config import resolve
    from megavg.trainer.evaluation_run import EvaluationRun

    EvaluationRun(resolve(tree)).run()


def lines_of(folder) -> int:
    path = folder / "metrics.jsonl"
    return len(training_lines(folder)) if path.exists() and path.read_text().endswith("\n") else 0


@pytest.fixture(scope="module")
def setting(checkpoints, scene_shards, tmp_path_factory):
    """Folder of the jobs, with run.yaml: a supervised training, in relative paths as users write them."""
    folder = tmp_path_factory.mktemp("jobs")
    tree = run_tree(checkpoints("qwen3_vl"), scene_shards(16), "run", "algorithm={name: sft}",
                    f"trainer.num_steps={STEPS}", f"trainer.save_every={STEPS}", "optimizer.warmup_steps=4")
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder, tree


@pytest.fixture(scope="module")
def trained(cluster, setting):
    """A training on 2 nodes x 2 ranks that is pre-empted in the middle; the job, its log, and the marker that it left."""
    folder, _ = setting
    job = cluster.submit(folder, "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1",
                         "--time=20", "slurm/train.sbatch", "run.yaml", "parallel.tensor_model_parallel_size=2")
    cluster.wait(job, "in its third step", lambda: lines_of(folder / "run") >= 2)
    urgent = cluster.submit(folder, "--partition=high", "--nodes=2", "--exclusive", "--output=urgent.log",
                            "--wrap=true")
    cluster.start_again(job, 1)
    assert cluster.finish(urgent, 60)[0] == "COMPLETED"
    marker = json.loads((folder / "run" / "stopped.json").read_text())
    state, status, log = cluster.finish(job)
    assert (state, status) == ("COMPLETED", 0), log
    return job, log, marker


def test_a_pre_empted_training_goes_on_by_itself(cluster, setting, trained):
    folder, (job, log, marker) = setting[0], trained
    assert marker["signal"] == "SIGTERM" and 2 <= marker["step"] < STEPS
    assert cluster.about(job)["Restarts"] == "1" and not (folder / "run" / "stopped.json").exists()
    words = ["start 1, ", f"SIGTERM: saved run/checkpoints/step-{marker['step']:06d} and leave",
             "asked to leave; back into the queue for restart 1 of 20", "start 2, ",
             f"resumed after step {marker['step']}", f"step {STEPS}/{STEPS}", "[slurm] finished, "]
    places = [log.find(word) for word in words]
    assert -1 not in places and places == sorted(places), log
    assert [path.name for path in folder.glob("*.out")] == [f"megavg-train-{job}.out"]
    assert not list(folder.glob(".ranks-*"))
    about = json.loads((folder / "run" / "run.json").read_text())
    assert (about["layout"], about["world_size"]) == ("TP2 x PP1 x DP2", 4)


def test_its_metrics_are_those_of_an_uninterrupted_run(setting, trained, tmp_path):
    folder, tree = setting
    tree = {**tree, "parallel": {"tensor_model_parallel_size": 2},
            "trainer": {**tree["trainer"], "output_dir": str(tmp_path / "whole")}}
    run_ranks(4, train, tree)
    expected = [without_times(line) for line in read_metrics(tmp_path / "whole")]
    assert [without_times(line) for line in read_metrics(folder / "run")] == expected
    losses = [line["loss"] for line in expected]
    assert len(losses) == STEPS and losses[-1] < losses[0]


def test_a_training_outlives_a_lost_node_a_hang_and_its_time_limit(cluster, setting):
    folder, run = setting[0], setting[0] / "hard"
    job = cluster.submit(folder, "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1",
                         "--time=20", "slurm/train.sbatch", "run.yaml", "trainer.output_dir=hard",
                         "trainer.num_steps=100000", "trainer.save_every=5", "parallel.hang_timeout_s=6")

    def newest() -> int:
        return max((int(path.parent.name.removeprefix("step-"))
                    for path in run.glob("checkpoints/step-*/manifest.json")), default=0)

    def goes_on_after(step: int) -> int:
        """The newest checkpoint, once it is a later one than that of ``step``."""
        cluster.wait(job, f"after step {step}", lambda: newest() > step)
        return newest()

    step = goes_on_after(0)
    cluster.lose_node("n1", job)  # the one with the job's script, so that only Slurm can start it again
    cluster.bring_back("n1")
    cluster.start_again(job, 1)
    step = goes_on_after(step)
    os.kill(rank_process(job, 1, "megavg/train.py"), signal.SIGSTOP)
    cluster.start_again(job, 2)
    goes_on_after(newest())
    # within half a minute, Slurm sees that less than the two minutes of train.sbatch's --signal are left
    hours, minutes, _ = map(int, cluster.about(job)["RunTime"].split(":"))
    cluster.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
    cluster.start_again(job, 3)
    marker = json.loads((run / "stopped.json").read_text())
    cluster.ask("scancel", job)
    state, _, log = cluster.finish(job, 60)
    assert state == "CANCELLED" and marker["signal"] == "SIGUSR1", log
    words = ["start 1, ", "start 2, ", "resumed after step ", "hang: rank 1 is gone: no heartbeat since",
             "hung; back into the queue for restart 2 of 20", "start 3, ", "resumed after step ",
             f"SIGUSR1: saved hard/checkpoints/step-{marker['step']:06d} and leave",
             "asked to leave; back into the queue for restart 3 of 20"]
    place = 0
    for word in words:
        assert word in log[place:], f"{word!r} is not in its place in:\n{log}"
        place = log.index(word, place) + len(word)
    steps = [line["step"] for line in training_lines(run)]
    assert steps == list(range(1, marker["step"] + 1)), "no step is missing or there twice"


def test_evaluation_over_two_nodes(cluster, setting, trained, scene_shards, tmp_path):
    folder, _ = setting
    tree = {"model": {"path": f"run/checkpoints/step-{STEPS:06d}", "dtype": "float32"},
            "data": {"prompt": "Locate {expression}."}, "generation": {"max_new_tokens": 16},
            "evaluation": {"sets": {"seen": [str(scene_shards(16))]}, "output_dir": "evaluated"}}
    (folder / "evaluate.yaml").write_text(yaml.safe_dump(tree))
    state, status, log = cluster.finish(cluster.submit(
        folder, "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1",
        "slurm/evaluate.sbatch", "evaluate.yaml"))
    assert (state, status) == ("COMPLETED", 0) and "TP1 x PP1 x DP2" in log, log
    tree["model"]["path"] = str(folder / tree["model"]["path"])
    tree["evaluation"]["output_dir"] = str(tmp_path)
    run_ranks(1, evaluate, tree)
    rows = "seen/rows.jsonl"
    assert (folder / "evaluated" / rows).read_text() == (tmp_path / rows).read_text() != ""


def test_a_killed_rank_takes_the_job_down_within_seconds(cluster, setting):
    folder, _ = setting
    job = cluster.submit(folder, "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1",
                         "slurm/train.sbatch", "run.yaml", "trainer.output_dir=killed", "trainer.num_steps=10000")
    cluster.wait(job, "in its second step", lambda: lines_of(folder / "killed") >= 1)
    os.kill(rank_process(job, 1, "megavg/train.py"), signal.SIGKILL)
    started = time.monotonic()
    state, status, log = cluster.finish(job, 60)
    assert (state, status) == ("FAILED", 137) and time.monotonic() - started < 30
    assert log.splitlines()[-1] == ("[slurm] rank 1 on n2 failed first, killed by SIGKILL, as a machine does that is "
                                    "out of memory")


def test_an_array_trains_one_seed_in_each_task(cluster, setting):
    folder, _ = setting
    array = cluster.submit(folder, "--array=1,4", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1",
                           "--cpus-per-task=1", "slurm/train.sbatch", "run.yaml", "trainer.output_dir=seeds",
                           "trainer.num_steps=2")
    losses = []
    for seed in (1, 4):
        state, status, log = cluster.finish(f"{array}_{seed}")
        assert (state, status) == ("COMPLETED", 0), log
        kept = yaml.safe_load((folder / "seeds" / f"seed-{seed}" / "config.yaml").read_text())
        assert kept["trainer"]["seed"] == seed
        losses.append([line["loss"] for line in read_metrics(folder / "seeds" / f"seed-{seed}")])
    assert losses[0] != losses[1] and len(losses[0]) == len(losses[1]) == 2


def test_conversion(cluster, setting, trained):
    folder, _ = setting
    state, status, log = cluster.finish(cluster.submit(
        folder, "--cpus-per-task=2", "slurm/convert.sbatch", f"run/checkpoints/step-{STEPS:06d}", "hf", "--no-verify"))
    assert (state, status) == ("COMPLETED", 0), log
    assert (folder / "hf" / "config.json").exists()
    with safe_open(folder / "hf" / "model.safetensors", "pt") as found, \
            safe_open(setting[1]["model"]["path"] + "/model.safetensors", "pt") as start:
        assert found.keys() == start.keys()


def test_shards_of_two_nodes_are_those_of_one_process(cluster, tmp_path):
    tried = cluster.call("srun", "--mpi=pmix", "-n1", "true")
    if tried.returncode:
        pytest.skip(f"this Slurm has no PMIx (package libpmix-dev): {tried.stderr.strip().splitlines()[0]}")
    options = ["--format", "scenes", "--count", "40", "--samples-per-shard", "8", "--seed", "3"]
    state, status, log = cluster.finish(cluster.submit(
        tmp_path, "--nodes=2", "--ntasks-per-node=1", "slurm/make_shards.sbatch", *options, "--out", "two"), 120)
    assert (state, status) == ("COMPLETED", 0) and log.count("wrote 40 samples in 5 shards") == 1, log
    subprocess.run([sys.executable, str(ROOT / "tools/make_shards.py"), *options, "--out", "one"], cwd=tmp_path,
                   check=True, capture_output=True, timeout=120)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and len(one) == 6
