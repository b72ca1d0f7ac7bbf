"""Short real trainings that several tests look at; each world of processes is started once."""

from __future__ import annotations

import pytest

from megavg.data.scenes import scenes
from megavg.data.writer import write_shards
from megavg.trainer.config import resolve
from megavg.trainer.trainer import Trainer
from tests.distributed import run_ranks
from tests.tiny_runs import run_tree, train

CLOSED_LOOP = ("algorithm.name=ecvgpo+two_stage+dapo", "algorithm.resample_tries=1", "algorithm.target_entropy=1.0",
               "algorithm.kappa=0.1", "trainer.num_steps=6", "trainer.export_hf=true",
               "evaluation.every=3", "evaluation.limit=2")


WARM = {"num_layers": 4, "vision_depth": 2}
"""Sizes of the warmed-up model: its deepstack's two additions fit on the first of two stages."""


class Killed(Exception):
    """Stands for the end of the process."""


def train_until(tree: dict, step: int) -> None:
    """Run a training that ends without any farewell before 0-based ``step``."""
    trainer = Trainer(resolve(tree))
    whole_step = trainer.train_step

    def train_step(number: int) -> None:
        if number == step:
            raise Killed
        whole_step(number)

    trainer.train_step = train_step
    with pytest.raises(Killed):
        trainer.run()


@pytest.fixture(scope="session")
def few_scenes(tmp_path_factory):
    """Folder with one shard of 8 scenes: few enough to be learnt by heart."""
    out = tmp_path_factory.mktemp("few") / "shards"
    write_shards(scenes(8, seed=0), str(out), "scenes", 8)
    return out


@pytest.fixture(scope="session")
def warm_up(checkpoints, few_scenes, tmp_path_factory):
    """Output folder of a supervised run on one process, stopped while its answers still vary."""
    out = tmp_path_factory.mktemp("warm_up") / "run"
    tree = run_tree(
        checkpoints("qwen3_vl", **WARM), few_scenes, out, "algorithm={name: sft}", "optimizer.lr=1e-2",
        "trainer.num_steps=60", "optimizer.warmup_steps=5", "optimizer.schedule=cosine", "data.prompts_per_step=16",
        "trainer.micro_batch_size=16", "trainer.export_hf=true")
    run_ranks(1, train, tree)
    return out


@pytest.fixture(scope="session")
def grpo_tree(warm_up, few_scenes):
    """``grpo_tree(output_dir, *overrides)``: a run of 3 ECVGPO steps from the warmed-up model."""
    def make(output_dir, *overrides: str) -> dict:
        return run_tree(warm_up / "hf", few_scenes, output_dir, f"evaluation.sets.seen=[{few_scenes}]",
                        "optimizer.lr=1e-4", "rollout.max_new_tokens=32", *overrides)

    return make


def _data_parallel_runs(whole: dict, uninterrupted: dict, killed: dict) -> None:
    train(whole)
    train(uninterrupted)
    train_until(killed, 4)


@pytest.fixture(scope="session")
def data_parallel(grpo_tree, tmp_path_factory):
    """Folder of three runs on 2 data-parallel ranks: ``whole`` has everything switched on; ``uninterrupted`` and
    ``killed`` (after 4 of 6 steps, with a checkpoint of 3) are the same run under a closed loop."""
    folder = tmp_path_factory.mktemp("data_parallel")
    whole = grpo_tree(folder / "whole", "evaluation.at_start=true", "evaluation.at_end=true", "trainer.export_hf=true",
                      "trainer.tensorboard=true", "trainer.picture_every=2", "trainer.save_every=3")
    run_ranks(2, _data_parallel_runs, whole, grpo_tree(folder / "uninterrupted", *CLOSED_LOOP, "trainer.save_every=2"),
              grpo_tree(folder / "killed", *CLOSED_LOOP, "trainer.save_every=3"))
    return folder
