"""Mistakes and broken data end in one clear line and exit code 2, or are skipped and counted."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml

from tests.distributed import free_port, run_ranks
from tests.tiny_runs import run_tree, training_lines

TRAIN = Path(__file__).resolve().parents[2] / "megavg" / "train.py"


def change_member(shard: Path, name_ends: str, change) -> None:
    """Rewrite one member of a tar, the first whose name ends so, with ``change(bytes)``."""
    members = []
    with tarfile.open(shard) as tar:
        for member in tar.getmembers():
            members.append((member, tar.extractfile(member).read()))
    at = next(i for i, (member, _) in enumerate(members) if member.name.endswith(name_ends))
    member, data = members[at]
    members[at] = (member, change(data))
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def box_outside(data: bytes) -> bytes:
    fields = json.loads(data)
    return json.dumps({**fields, "boxes_xyxy_px": [[0, 0, fields["width"] + 1, 5]]}).encode()


@pytest.fixture(scope="session")
def broken_shards(few_scenes, tmp_path_factory):
    """Folders of one shard each with one thing broken in it: the box, the picture, or the tar itself."""
    folder = tmp_path_factory.mktemp("broken")
    for name in ("box", "picture", "torn"):
        shutil.copytree(few_scenes, folder / name)
    change_member(folder / "box" / "scenes-000000.tar", ".json", box_outside)
    change_member(folder / "picture" / "scenes-000000.tar", ".png", lambda data: data[:len(data) // 2])
    torn = folder / "torn" / "scenes-000000.tar"
    torn.write_bytes(torn.read_bytes()[:-9_000])
    return folder


def damaged_checkpoints(good: Path, folder: Path) -> None:
    """Copies of a checkpoint, each with something missing or broken."""
    for name in ("no_config", "no_weights", "short_weights", "missing_shard", "bad_config", "other_model",
                 "no_tokenizer", "other_size"):
        shutil.copytree(good, folder / name)
    (folder / "no_config" / "config.json").unlink()
    (folder / "no_weights" / "model.safetensors").unlink()
    weights = folder / "short_weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    (folder / "missing_shard" / "model.safetensors").unlink()
    (folder / "missing_shard" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}))
    (folder / "bad_config" / "config.json").write_text("{")
    (folder / "no_tokenizer" / "tokenizer.json").unlink()
    config = json.loads((good / "config.json").read_text())
    (folder / "other_model" / "config.json").write_text(json.dumps({**config, "model_type": "qwen3"}))
    config["text_config"]["hidden_size"] = 128
    (folder / "other_size" / "config.json").write_text(json.dumps(config))


def start_up_mistakes(folder: Path) -> dict[str, tuple[str, str]]:
    """name -> (override, what the message must hold)."""
    return {
        "no checkpoint": (f"model.path={folder}/nowhere", f"checkpoint directory {folder}/nowhere does not exist"),
        "no config": (f"model.path={folder}/no_config", f"{folder}/no_config/config.json is missing"),
        "no weights": (f"model.path={folder}/no_weights",
                       "holds neither model.safetensors nor model.safetensors.index.json"),
        "missing shard": (f"model.path={folder}/missing_shard", "model-00001-of-00002.safetensors is missing, but"),
        "short weights": (f"model.path={folder}/short_weights", "short_weights/model.safetensors cannot be read"),
        "bad config": (f"model.path={folder}/bad_config", "bad_config/config.json"),
        "other model": (f"model.path={folder}/other_model", "is no family of megavg (did you mean 'qwen3_vl'?)"),
        "no tokenizer": (f"model.path={folder}/no_tokenizer", "no_tokenizer"),
        "other size": (f"model.path={folder}/other_size", "config.json and the weights do not belong together"),
        "no shards": (f"data.shards=[{folder}/no-*.tar]", f"no shard matches '{folder}/no-*.tar'"),
        "no evaluation shards": (f"evaluation.sets.val=[{folder}/val]", f"no shard matches '{folder}/val'"),
        "no prompts": (f"data.prompts_file={folder}/no.yaml",
                       f"cannot read the prompts of {folder}/no.yaml: No such file"),
        "world size": ("parallel.tensor_model_parallel_size=2",
                       "world size 1 is not divisible by tensor_model_parallel_size * pipeline_model_parallel_size"),
        "output is a file": (f"trainer.output_dir={folder}/no_config/tokenizer_config.json", "tokenizer_config.json"),
    }


def run_commands(trees: dict[str, dict], folder: str) -> dict[str, tuple[int, str]]:
    """(exit code, stderr) of the entry point for each tree, on this process."""
    from megavg.train import main

    found = {}
    for name, tree in trees.items():
        path = Path(folder) / f"{name.replace(' ', '_')}.yaml"
        path.write_text(yaml.safe_dump(tree))
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            code = main(["--config", str(path)])
        found[name] = code, errors.getvalue()
    return found


SKIP = ("data.on_error=skip", "trainer.num_steps=3")


@pytest.fixture(scope="module")
def outcomes(checkpoints, few_scenes, broken_shards, tmp_path_factory):
    """(folder, name -> (exit code, stderr)) of many runs on one process."""
    folder = tmp_path_factory.mktemp("bad")
    good = checkpoints("qwen3_vl")
    damaged_checkpoints(good, folder)
    trees = {name: run_tree(good, few_scenes, folder / "out", override)
             for name, (override, _) in start_up_mistakes(folder).items()}
    for broken in ("box", "picture", "torn"):
        trees[f"{broken} raises"] = run_tree(good, broken_shards / broken, folder / f"{broken}_raises")
        trees[f"{broken} is skipped"] = run_tree(good, broken_shards / broken, folder / f"{broken}_skipped", *SKIP)
    trees["too many skipped"] = run_tree(good, broken_shards / "box", folder / "too_many", *SKIP, "data.max_skipped=0")
    trees["broken evaluation"] = run_tree(good, few_scenes, folder / "evaluation", "evaluation.at_start=true",
                                          f"evaluation.sets.val=[{broken_shards / 'picture'}]")
    return folder, run_ranks(1, run_commands, trees, str(folder))[0]


@pytest.mark.parametrize("name", start_up_mistakes(Path()))
def test_start_up_mistakes(outcomes, name):
    folder, results = outcomes
    code, errors = results[name]
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(told) == 1 and "Traceback" not in errors
    assert start_up_mistakes(folder)[name][1] in told[0]
    assert not (folder / "out").exists()


@pytest.mark.parametrize("name, message", [
    ("box raises", "box outside image: [0, 0, 97, 5] leaves the 96 x 96 image; repair it, or set on_error='skip'"),
    ("picture raises", "broken image"), ("torn raises", "torn shard: not a whole uncompressed tar"),
    ("too many skipped", "1 records were skipped ({'box outside image': 1}), more than max_skipped=0"),
    ("broken evaluation", "broken image"),
])
def test_broken_data_ends_the_run_in_one_line(outcomes, name, message):
    code, errors = outcomes[1][name]
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(told) == 1 and "Traceback" not in errors
    assert message in told[0] and "scenes-000000.tar" in told[0]


@pytest.mark.parametrize("broken", ["box", "picture", "torn"])
def test_broken_data_is_skipped_and_counted(outcomes, broken):
    folder, results = outcomes
    assert results[f"{broken} is skipped"][0] == 0
    lines = training_lines(folder / f"{broken}_skipped")
    assert len(lines) == 3 and lines[-1]["data/skipped"] == 1, "counted once, however often it was met"


def launch(tree: dict, folder: Path, world_size: int) -> list[tuple[int, str]]:
    """(exit code, stderr) of every process of a world, started as a launcher does."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    world = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
             "LOCAL_WORLD_SIZE": str(world_size), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen(
        [sys.executable, str(TRAIN), f"--local_rank={rank}", "--config", str(path)], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world_size)]
    try:
        return [(process.returncode, errors) for process, (_, errors) in
                [(process, process.communicate(timeout=120)) for process in ranks]]
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()


def test_a_world_that_the_layout_does_not_divide(checkpoints, few_scenes, tmp_path):
    tree = run_tree(checkpoints("qwen3_vl"), few_scenes, tmp_path / "out", "parallel.tensor_model_parallel_size=2")
    results = launch(tree, tmp_path, 3)
    assert [code for code, _ in results] == [2, 2, 2]
    told = [line for _, errors in results for line in errors.splitlines() if line.startswith("error: ")]
    assert told == ["error: world size 3 is not divisible by tensor_model_parallel_size * pipeline_model_parallel_size "
                    "= 2 * 1; change parallel.tensor_model_parallel_size or parallel.pipeline_model_parallel_size, or "
                    "start another number of processes"]
    assert not any("Traceback" in errors for _, errors in results) and not (tmp_path / "out").exists()


def test_a_picture_that_only_one_rank_decodes_ends_both(checkpoints, broken_shards, tmp_path):
    """Without an agreement the other rank would wait for its time-out."""
    began = time.monotonic()
    results = launch(run_tree(checkpoints("qwen3_vl"), broken_shards / "picture", tmp_path / "out"), tmp_path, 2)
    assert [code for code, _ in results] == [2, 2] and time.monotonic() - began < 100
    told = [line for _, errors in results for line in errors.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "scenes-000000.tar: sample 'scene-0-" in told[0] and "broken image" in told[0]
    assert not any("Traceback" in errors for _, errors in results)
