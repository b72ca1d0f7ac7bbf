"""The command line and the configuration: typed, strict, and quick to say what is wrong."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import yaml

from megavg.algorithms.ecvgpo import ECVGPO
from megavg.protocols.config import ConfigError, apply_overrides
from megavg.trainer.config import RunConfig, parse_command_line, resolve, save_resolved
from tests.tiny_runs import run_tree

TRAIN = Path(__file__).resolve().parents[2] / "megavg" / "train.py"


@pytest.fixture
def tree(tmp_path):
    """A whole configuration whose model and shards need not exist: that is looked at later."""
    return run_tree(tmp_path / "model", tmp_path / "shards", tmp_path / "out")


@pytest.fixture
def file(tree, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(*arguments, cwd, **environment):
    return subprocess.run([sys.executable, str(TRAIN), *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          timeout=60, env={**os.environ, **environment})


MISTAKES = {
    "unknown section": ("optimzer.lr=1", "unknown section optimzer (did you mean 'optimizer'?)"),
    "unknown option": ("trainer.num_step=5", "unknown option trainer.num_step (did you mean 'num_steps'?)"),
    "unknown nested option": ("parallel.zero.reduce_bucket=5",
                              "unknown option parallel.zero.reduce_bucket (did you mean 'reduce_bucket_size'?)"),
    "option that nothing is like": ("model.q=5", "unknown option model.q (known: box_format, dtype, "
                                    "freeze_projector, freeze_vision_tower, max_pixels, min_pixels, path)"),
    "wrong type": ("trainer.num_steps=many", "trainer.num_steps: expected int, got 'many'"),
    "bool is no number": ("optimizer.lr=true", "optimizer.lr: expected float, got True"),
    "number is no bool": ("trainer.resume=1", "trainer.resume: expected bool, got 1"),
    "text is no list": ("data.shards=here.tar", "data.shards: expected a list, got 'here.tar'"),
    "wrong type in a list": ("data.shards=[1]", "data.shards[0]: expected str, got 1"),
    "section that is a number": ("trainer=5", "trainer: expected a section, got 5"),
    "option inside an option": ("model.path.x=5", "cannot set model.path.x: path is not a section"),
    "empty value": ("trainer.output_dir=", "trainer.output_dir: expected str, got None"),
    "bad literal": ("model.dtype=float23",
                    "model.dtype: 'float23' is not one of float32, bfloat16 (did you mean 'float32'?)"),
    "override without a value": ("trainer.num_steps",
                                 "cannot read 'trainer.num_steps': an override is written section.key=value"),
    "override without a key": ("=5", "cannot read '=5'"),
    "override that is no YAML": ("data.shards=[a",
                                 "data.shards: cannot read the value '[a' as YAML; put quotes around a text"),
    "unknown algorithm": ("algorithm.name=ecvgp", "algorithm.name='ecvgp' does not exist (did you mean 'ecvgpo'?)"),
    "unknown outside algorithm": ("algorithm.name=no_such.thing",
                                  "cannot import module 'no_such'; is its folder on PYTHONPATH?"),
    "module that is no algorithm": ("algorithm.name=json.decoder", "module json.decoder defines no ALGORITHM"),
    "no algorithm": ("algorithm=", "missing option algorithm.name; grpo is the plain choice"),
    "unknown algorithm option": ("algorithm.alfa=1", "unknown option algorithm.alfa (did you mean 'alpha'?)"),
    "algorithm option out of range": ("algorithm.w_min=2", "algorithm: expected w_min <= 1 <= w_max"),
    "unknown reward": ("rewards=[{name: iuo}]", "rewards[0].name='iuo' does not exist (did you mean 'iou'?)"),
    "unknown reward option": ("rewards=[{name: iou, treshold: 0.5}]",
                              "rewards[0] (iou): there is no option 'treshold' (did you mean 'threshold'?)"),
    "no reward": ("rewards=[]", "rewards: expected a list of one or more entries"),
    "prompt without the expression": ("data.prompt=Where is it?", "write {expression} where the expression goes"),
    "prompt with another field": ("data.prompt='{expression} {image}'", "write {expression} where the expression goes"),
    "prompt with an attribute": ("data.prompt='{expression.x}'", "write {expression} where the expression goes"),
    "prompt of no task": ("data.prompts={pint: '{expression}'}",
                          "data: prompts: there is no task 'pint' (did you mean 'point'?)"),
    "prompt of a task without the expression": ("data.prompts.rec=what?", "prompts.rec='what?' cannot be filled in"),
    "few known boxes": ("data.check_frame_samples=3", "data: check_frame_samples=3 must be at least 4"),
    "unknown way to check": ("data.check_frame=on", "data.check_frame: 'on' is not one of stop, warn, off"),
    "unknown box format": ("model.box_format=json_resized", "model: box_format='json_resized' does not exist (did you "
                           "mean 'json_resized_px'?)"),
    "thoughts that a reward forbids": ("data.thinking=true rewards=[{name: iou}, {name: format}]".split(" ", 1),
                                       "rewards[1] (format): data.thinking=true asks for thoughts"),
    "one answer per prompt": ("rollout.group_size=1", "ecvgpo compares answers to one prompt and needs at least 2"),
    "no answer": ("rollout.group_size=0", "rollout: group_size=0 must be at least 1"),
    "layers of other stages": ("parallel.pipeline_layers=[3,4]",
                               "pipeline_layers=[3, 4] must be one number for each of pipeline_model_parallel_size=1"),
    "no pipeline stage": ("parallel.pipeline_model_parallel_size=0",
                          "pipeline_model_parallel_size=0 must be at least 1"),
    "share above one": ("parallel.image_token_share=1.5", "image_token_share=1.5 must be in 0..1"),
    "offloaded parameters alone": ("parallel.zero.offload_parameters=true",
                                   "offload_parameters needs offload_optimizer=true"),
    "negative budget": ("trainer.micro_batch_tokens=-1", "trainer: micro_batch_tokens=-1 must be at least 0"),
    "no tensor parallelism": ("parallel.tensor_model_parallel_size=0",
                              "tensor_model_parallel_size=0 must be at least 1"),
    "no steps": ("trainer.num_steps=0", "trainer: num_steps=0 must be at least 1"),
    "negative period": ("trainer.save_every=-1", "trainer: save_every=-1 must be at least 0"),
    "no learning": ("optimizer.lr=0", "optimizer: lr=0.0 must be above 0"),
    "one beta": ("optimizer.betas=[0.9]", "betas=(0.9,) must be two numbers"),
    "top_p": ("rollout.top_p=1.5", "rollout: top_p=1.5 must be in (0, 1]"),
    "set that is no list": ("evaluation.sets.val=a.tar", "sets.val: expected a list of shards, got 'a.tar'"),
    "set named like a path": ("evaluation.sets={a/b: [a.tar]}", "the name 'a/b' may only hold"),
}


@pytest.mark.parametrize("override, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_name_the_option_and_the_remedy(file, override, message):
    with pytest.raises(ConfigError) as caught:
        parse_command_line(["--config", str(file), *([override] if isinstance(override, str) else override)])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [
    "unknown section", "unknown option", "wrong type", "bad literal", "override without a value", "unknown algorithm",
    "unknown algorithm option", "unknown reward", "unknown reward option", "prompt without the expression",
    "one answer per prompt", "layers of other stages"])
def test_the_command_says_it_in_one_line(file, tmp_path, kind):
    override, message = MISTAKES[kind]
    result = start("--config", file, override, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("section, option", [("model", "path"), ("data", "shards"), ("trainer", "output_dir")])
def test_missing_options(tree, section, option):
    del tree[section][option]
    message = "give either data.shards .* or data.mixture" if section == "data" else \
        f"missing option {section}.{option}: it has no default"
    with pytest.raises(ConfigError, match=message):
        resolve(tree)


@pytest.mark.parametrize("text, message", [
    ("model: {path: x", "is not valid YAML"), ("- a list", "expected a mapping of sections at the top, got list"),
    ("", "missing option algorithm.name"), ("algorithm: {name: grpo}\n1: {a: b}", "unknown section 1"),
    ("algorithm: {name: grpo}", "missing option model")])
def test_files_that_are_no_configuration(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    result = start("--config", path, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml does not exist"):
        parse_command_line(["--config", str(tmp_path / "nowhere.yaml")])


def test_help_and_typos_answer_in_under_a_second(file, tmp_path):
    for arguments, code, text in ((["--help"], 0, "section.key=value"),
                                  (["--config", file, "trainer.num_step=1"], 2, "num_steps")):
        durations = []
        for _ in range(3):
            began = time.perf_counter()
            result = start(*arguments, cwd=tmp_path)
            durations.append(time.perf_counter() - began)
            assert result.returncode == code and text in result.stdout + result.stderr
        assert min(durations) < 1.0


def test_no_torch_before_the_configuration_is_right(file, tmp_path):
    code = ("import sys\nfrom megavg.trainer.config import parse_command_line\n"
            "for name in sys.argv[2:]:\n"
            "    parse_command_line(['--config', sys.argv[1], f'algorithm={{name: {name}}}'])\n"
            "heavy = {'torch', 'transformers', 'deepspeed', 'megatron', 'webdataset', 'numpy'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    result = subprocess.run([sys.executable, "-c", code, str(file), "grpo", "ecvgpo", "sft"], cwd=TRAIN.parents[1],
                            capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_overrides_are_typed(file):
    config = parse_command_line([
        "--config", str(file), "optimizer.lr=1e-6", "optimizer.betas=[0.8, 1]", "trainer.num_steps=7",
        "trainer.overwrite=true", "algorithm.target_entropy=1", "algorithm.level=answer", "model.max_pixels=null",
        "data.shards=[a.tar, 'b-{0..3}.tar']", "parallel.zero.overlap_comm=yes", "evaluation.sets.val=[c.tar]"])
    assert config.optimizer.lr == 1e-6 and isinstance(config.optimizer.lr, float)
    assert config.optimizer.betas == (0.8, 1.0) and isinstance(config.optimizer.betas[1], float)
    assert config.trainer.num_steps == 7 and config.trainer.overwrite is True
    assert config.algorithm == ECVGPO.Config(target_entropy=1.0, level="answer")
    assert isinstance(config.algorithm.target_entropy, float)
    assert config.model.max_pixels is None and config.data.shards == ["a.tar", "b-{0..3}.tar"]
    assert config.parallel.zero.overlap_comm is True and config.evaluation.sets == {"val": ["c.tar"]}


@pytest.mark.parametrize("text, value", [("off", "off"), ("'off'", "off"), ("warn", "warn"), ("stop", "stop")])
def test_off_is_a_word(file, text, value):
    """YAML reads it as a boolean."""
    assert parse_command_line(["--config", str(file), f"data.check_frame={text}"]).data.check_frame == value


def test_the_defaults_ask_with_the_familys_own_prompt(tree):
    del tree["data"]["prompt"], tree["data"]["check_frame"]
    config = resolve(tree)
    assert (config.data.prompt, config.data.prompts, config.data.prompts_file) == ("", {}, "")
    assert (config.data.check_frame, config.data.check_frame_samples, config.model.box_format) == ("stop", 8, "")
    tree["data"] |= {"thinking": True}
    tree["rewards"] = [{"name": "format", "thinking": True}]
    assert resolve(tree).data.thinking


def test_later_overrides_win_and_the_tree_is_not_changed(tree):
    before = yaml.safe_dump(tree)
    changed = apply_overrides(tree, ["trainer.num_steps=5", "trainer.num_steps=6", "new.deep.key=1"])
    assert changed["trainer"]["num_steps"] == 6 and changed["new"] == {"deep": {"key": 1}}
    assert yaml.safe_dump(tree) == before


def test_an_empty_section_takes_its_defaults_and_overrides(tree):
    tree["parallel"] = None
    config = resolve(apply_overrides(tree, ["parallel.tensor_model_parallel_size=2"]))
    assert config.parallel.tensor_model_parallel_size == 2
    assert resolve(tree).parallel.tensor_model_parallel_size == 1


def test_the_resolved_configuration_reads_back_equal(tree, tmp_path):
    tree = apply_overrides(tree, ["algorithm.form=power", "optimizer.betas=[0.5, 0.6]", "evaluation.sets.val=[c.tar]",
                                  "rewards=[{name: iou, threshold: 0.5}, {name: format, weight: 0.1}]"])
    config = resolve(tree)
    path = tmp_path / "config.yaml"
    save_resolved(config, path)
    assert parse_command_line(["--config", str(path)]) == config
    saved = yaml.safe_load(path.read_text())
    names = {f.name for f in dataclasses.fields(RunConfig)} - {"algorithm_name"}
    assert set(saved) == names, "every section is written, defaults included"
    assert saved["algorithm"]["name"] == "ecvgpo" and saved["algorithm"]["clip_low"] == 0.2
    assert not list(tmp_path.glob("*.tmp"))


def test_every_option_is_documented():
    def check(cls):
        for field in dataclasses.fields(cls):
            documentation = " ".join(base.__doc__ or "" for base in cls.__mro__[:-1])
            assert re.search(rf"\b{field.name}\b", documentation), f"{cls.__name__}.{field.name}"
            factory = field.default_factory
            if isinstance(factory, type) and dataclasses.is_dataclass(factory):
                check(factory)

    hints = typing.get_type_hints(RunConfig)
    for name in ("model", "data", "trainer", "parallel", "rollout", "optimizer", "evaluation"):
        check(hints[name])


@pytest.mark.parametrize("flag", [["--local_rank=0"], ["--local_rank", "1"], ["--local-rank=1"]])
def test_launchers_flag_before_the_users_arguments(file, flag):
    config = parse_command_line([*flag, "--config", str(file), "trainer.num_steps=9"])
    assert config.trainer.num_steps == 9


def test_overrides_may_stand_before_the_file(file):
    assert parse_command_line(["trainer.num_steps=9", "--config", str(file)]).trainer.num_steps == 9


def test_only_the_first_process_speaks(file, tmp_path):
    for rank, lines in (("0", 1), ("1", 0)):
        result = start("--local_rank", rank, "--config", file, "x.y=1", cwd=tmp_path, LOCAL_RANK=rank, RANK=rank,
                       WORLD_SIZE="2")
        assert result.returncode == 2 and result.stderr.count("\n") == lines


def test_plug_ins_from_outside_by_their_dotted_name(file, tmp_path):
    package = tmp_path / "my_plugins"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "calm.py").write_text(
        "from dataclasses import dataclass\nfrom megavg.algorithms.base import Algorithm\n\n\n"
        "class Calm(Algorithm):\n    @dataclass(frozen=True)\n    class Config(Algorithm.Config):\n"
        "        calm: float = 0.5\n\n\nALGORITHM = Calm\n")
    (package / "short.py").write_text(
        "from megavg.protocols.sample import RewardResult\n\n\n"
        "def reward(completion, sample, *, limit: int = 9):\n"
        "    return RewardResult(float(len(completion.text) < limit), 'ok')\n")
    code = ("import sys\nfrom megavg.trainer.config import parse_command_line\n"
            "config = parse_command_line(sys.argv[1:])\nprint(config.algorithm.calm, config.rewards[0]['limit'])")
    arguments = ["--config", str(file), "algorithm={name: my_plugins.calm, calm: 2}",
                 "rewards=[{name: my_plugins.short, limit: 4}]"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{TRAIN.parents[1]}"}
    result = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, cwd=tmp_path,
                            capture_output=True, text=True, timeout=60)
    assert result.stdout == "2.0 4\n", result.stderr
    wrong = start(*arguments[:2], "algorithm={name: my_plugins.calm, clam: 2}", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert wrong.returncode == 2 and "unknown option algorithm.clam (did you mean 'calm'?)" in wrong.stderr


@pytest.mark.parametrize("algorithm, message", [
    ("{name: dapo, overlong_cache: 65}", "overlong_cache=65 is more than rollout.max_new_tokens=64"),
    ("{name: saei, num_clean: 9}", "num_clean=9 is more than rollout.group_size=8"),
    ("{name: top_entropy+gspo}", "set algorithm.ratio_level=token"),
])
def test_options_that_do_not_fit_the_rollouts_are_refused_at_once(algorithm, message):
    tree = {"model": {"path": "m"}, "data": {"shards": ["d"]}, "trainer": {"output_dir": "o"}}
    with pytest.raises(ConfigError, match=message):
        resolve(apply_overrides(tree, [f"algorithm={algorithm}"]))
    resolve(apply_overrides(tree, ["algorithm={name: top_entropy+gspo, ratio_level: token}"]))
