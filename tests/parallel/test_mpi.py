"""Training and evaluation under a real MPI: plain mpirun, and DeepSpeed's launcher for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.tiny_runs import run_tree, training_lines, without_times

ROOT = Path(__file__).resolve().parents[2]
BIN = str(Path(sys.executable).parent)
MPIRUN = shutil.which("mpirun", path=BIN + os.pathsep + os.environ["PATH"])
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MPIRUN is None, reason="mpirun is not installed")]


@pytest.fixture(scope="module")
def start(checkpoints, scene_shards, tmp_path_factory):
    """``start(name, *overrides)`` -> (output folder, configuration file) of a training of 2 steps."""
    folder = tmp_path_factory.mktemp("mpi")

    def make(name: str, *overrides: str) -> tuple[Path, Path]:
        tree = run_tree(checkpoints("qwen3_vl"), scene_shards(8), folder / name, "algorithm={name: sft}",
                        "trainer.num_steps=2", *overrides)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        return folder / name, folder / f"{name}.yaml"

    return make


def run(*command: str, **environment: str) -> str:
    """What the command says, errors too; none of the launchers' variables of this process are passed on."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK",
                                                                           "MASTER_ADDR", "MASTER_PORT")}
    done = subprocess.run(command, cwd=ROOT, text=True, timeout=400, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**kept, "PATH": BIN + os.pathsep + kept["PATH"], "DS_ACCELERATOR": "cpu",
                               "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", **environment})
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def plain(start):
    """The training under plain mpirun, which says nothing of where to meet."""
    folder, config = start("plain")
    said = run(MPIRUN, "--oversubscribe", "-n", "2", sys.executable, "megavg/train.py", "--config", str(config))
    assert said.count("TP1 x PP1 x DP2") == 1 and said.count("[megavg] step 2/2") == 1
    return folder


def test_deepspeed_over_mpi_trains_as_plain_mpirun(plain, start, tmp_path):
    folder, config = start("deepspeed")
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    run("deepspeed", "--launcher", "openmpi", "--hostfile", str(tmp_path / "hosts"), "--force_multi", "--no_ssh_check",
        "--master_addr", "127.0.0.1", "--launcher_args=--oversubscribe", "megavg/train.py", "--config", str(config))
    lines = [[without_times(line) for line in training_lines(run)] for run in (plain, folder)]
    assert len(lines[0]) == 2 and lines[0] == lines[1]


def test_evaluation_over_mpi_answers_what_one_process_answers(start, checkpoints, scene_shards, tmp_path):
    def tree(name: str) -> Path:
        config = {"model": {"path": str(checkpoints("qwen3_vl")), "dtype": "float32"},
                  "data": {"prompt": "Locate {expression}."}, "generation": {"max_new_tokens": 8},
                  "evaluation": {"output_dir": str(tmp_path / name), "sets": {"seen": {"shards": [str(scene_shards(8))]}}}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        return tmp_path / f"{name}.yaml"

    run(sys.executable, "megavg/evaluate.py", "--config", str(tree("one")))
    run(MPIRUN, "--oversubscribe", "-n", "2", sys.executable, "megavg/evaluate.py", "--config", str(tree("two")))
    one, two = ((tmp_path / name / "seen" / "rows.jsonl").read_text() for name in ("one", "two"))
    assert len(one.splitlines()) == 8 and one == two
    figures = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert figures[0].keys() == figures[1].keys()
