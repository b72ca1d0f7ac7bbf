"""The examples: strict, honest in their heads, and each paper's trains for a step on every family."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from megavg.protocols.config import apply_overrides, read_yaml
from megavg.trainer.config import algorithm_class, parse_command_line, resolve
from tests.distributed import run_ranks
from tests.tiny_runs import all_finite, train, training_lines
from tools.make_shards import build_parser
from tools.shard_formats import load_formats

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "papers"
PAPERS = {"ecvgpo": "2512.06726", "vepo": "2606.03937", "two_stage": "2511.07738", "saei": "2512.10414"}
FAMILIES = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
NAMES = [f"{paper}_{family}" for paper in PAPERS for family in FAMILIES]
# what the methods themselves report of a step
METRIC = {"ecvgpo": "ecvgpo/alpha", "vepo": "vepo/selected_share", "two_stage": "two_stage/coefficient",
          "saei": "saei/entropy_attacked"}


def head(path: Path) -> str:
    """The comment at the start of a file, as running text."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


def parts(name: str) -> tuple[str, str]:
    """(paper, family) of a file's name."""
    paper = next(paper for paper in PAPERS if name.startswith(paper))
    return paper, name.removeprefix(f"{paper}_")


def test_there_is_one_for_each_paper_and_family():
    assert sorted(path.stem for path in FOLDER.glob("*")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_head_says_what_it_is(name):
    paper, family = parts(name)
    path = FOLDER / f"{name}.yaml"
    config, text = resolve(read_yaml(path)), head(path)
    assert config.algorithm_name == paper and f"arXiv {PAPERS[paper]}" in text
    assert f"{algorithm_class(paper).mark}, on {FAMILIES[family]} " in text
    assert "Not yet run on a GPU" in text and "Data: " in text
    command = re.search(r"deepspeed --num_gpus 8 megavg/train.py (--config \S+)", text)
    assert parse_command_line(shlex.split(command[1].replace("examples", str(ROOT / "examples")))) == config
    assert f"/{FAMILIES[family].replace(' ', '-')}-" in config.model.path and config.model.dtype == "bfloat16"


@pytest.mark.parametrize("paper", PAPERS)
def test_the_shards_are_made_by_commands_that_exist(paper):
    """And the configuration reads what the commands of its head write."""
    parser = build_parser(load_formats())
    for path in FOLDER.glob(f"{paper}_*.yaml"):
        lines = "\n".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
        commands = re.findall(r"^python tools/make_shards.py (.*)", lines.replace("\\\n", " "), re.MULTILINE)
        outs = {parser.parse_args(shlex.split(command)).out for command in commands}
        outs |= set(re.findall(r"--out (data/[\w+/]+)", lines))
        config = resolve(read_yaml(path))
        read = {*config.data.shards, *(shard for shards in config.evaluation.sets.values() for shard in shards)}
        assert commands and read == outs


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_fits_eight_gpus(name):
    config = resolve(read_yaml(FOLDER / f"{name}.yaml"))
    ranks = 8 // config.parallel.tensor_model_parallel_size
    assert config.parallel.tensor_model_parallel_size * ranks == 8 and config.data.prompts_per_step % ranks == 0


@pytest.mark.parametrize("paper", PAPERS)
def test_families_differ_only_where_they_must(paper):
    """The same hyperparameters for each family."""
    trees = [resolve(read_yaml(FOLDER / f"{paper}_{family}.yaml")).tree() for family in FAMILIES]
    for tree in trees:
        for section, option in (("model", "path"), ("model", "max_pixels"), ("data", "prompt"),
                                ("trainer", "output_dir"), ("parallel", "tensor_model_parallel_size")):
            del tree[section][option]
    assert trees[0] == trees[1] == trees[2]


def dry_run(trees: dict[str, dict]) -> None:
    for tree in trees.values():
        train(tree)


@pytest.fixture(scope="module")
def dry_runs(checkpoints, scene_shards, tmp_path_factory):
    """Folder with the run of each example after one step on the CPU: other paths, sizes, dtype and layout only."""
    folder, shards = tmp_path_factory.mktemp("papers"), str(scene_shards(8))
    trees = {}
    for name in NAMES:
        tree = read_yaml(FOLDER / f"{name}.yaml")
        sets = {key: [shards] for key in tree["evaluation"]["sets"]}
        trees[name] = apply_overrides(tree, [
            f"model.path={checkpoints(parts(name)[1])}", "model.dtype=float32", "model.max_pixels=16384",
            "parallel.tensor_model_parallel_size=1", f"data.shards=[{shards}]", "data.prompts_per_step=2",
            "rollout.max_new_tokens=12", f"evaluation.sets={json.dumps(sets)}", "evaluation.limit=2",
            f"trainer.output_dir={folder / name}", "trainer.num_steps=1", "data.check_frame=off"])
    run_ranks(1, dry_run, trees, timeout=600)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_each_trains_for_a_step(dry_runs, name):
    paper, family = parts(name)
    line, = training_lines(dry_runs / name)
    assert all_finite(line) and METRIC[paper] in line
    assert json.loads((dry_runs / name / "run.json").read_text())["family"] == family
    result, = (dry_runs / name / "evaluation").glob("*-000001.json")
    assert json.loads(result.read_text())["num_samples"] == 2
    assert (dry_runs / name / "hf" / "config.json").is_file()
