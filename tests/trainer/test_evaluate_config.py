"""The configuration of an evaluation: strict, and resolved to what can be read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megavg.protocols.config import ConfigError, apply_overrides, read_yaml
from megavg.trainer.evaluate_config import SetConfig, parse_command_line, resolve

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("evaluate_*.yaml"))
TREE = {"model": {"path": "m"}, "evaluation": {"output_dir": "out", "sets": {"val": ["a.tar"]}}}


def changed(*overrides: str) -> dict:
    return apply_overrides(TREE, list(overrides))


def test_both_ways_to_name_a_set():
    config = resolve(changed("evaluation.sets.pro={shards: [b.tar], benchmark: screenspot_pro, where: {group: CAD}}"))
    assert config.evaluation.sets["val"] == SetConfig(["a.tar"])
    assert config.evaluation.sets["pro"] == SetConfig(["b.tar"], "screenspot_pro", "", {"group": "CAD"})


def test_the_resolved_configuration_reads_back(tmp_path):
    config = resolve(changed("evaluation.sets.pro={shards: [b.tar], task: point}", "data.prompts.rec=Find {expression}",
                             "parallel.tensor_model_parallel_size=2"))
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config.tree()))
    assert parse_command_line(["--local_rank=0", "--config", str(path)]) == config


@pytest.mark.parametrize("override, message", [
    ("evaluation.setz={}", r"unknown option evaluation.setz \(did you mean 'sets'\?\)"),
    ("evalution.sets={}", r"unknown section evalution \(did you mean 'evaluation'\?\)"),
    ("evaluation.sets={}", "sets is empty"),
    ("evaluation.sets={a: b.tar}", "sets.a: expected a list of shards or a section with shards, got 'b.tar'"),
    ("evaluation.sets={a: {shard: [b.tar]}}", r"unknown option evaluation.sets.a.shard \(did you mean 'shards'\?\)"),
    ("evaluation.sets={a: {shards: [b.tar], benchmark: refcocog}}", r"evaluation.sets.a.benchmark: 'refcocog' is not"),
    ("evaluation.sets={a/b: [c.tar]}", "the name 'a/b' may only hold"),
    ("evaluation.sets={'..': [c.tar]}", r"the name '\.\.' may only hold"),
    ("evaluation.sets={results.json: [c.tar]}", "the name 'results.json' is that of a file of results in output_dir"),
    ("evaluation.sets={Results.md: [c.tar]}", "the name 'Results.md' is that of a file"),
    ("evaluation.sets={results.md.tmp: [c.tar]}", "the name 'results.md.tmp' is that of a file"),
    ("evaluation.sets={a: []}", "evaluation.sets.a: shards is empty"),
    ("evaluation.limit=-1", "limit=-1 must be at least 0"),
    ("generation.max_new_tokens=0", "max_new_tokens=0 must be at least 1"),
    ("data.prompt=Find it", "does not hold {expression}"),
    ("data.prompts.recs=Find {expression}", "there is no task 'recs'"),
    ("model.box_format=json", "box_format='json' does not exist"),
    ("algorithm.name=grpo", "unknown section algorithm"),
])
def test_mistakes_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        resolve(changed(override))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_configurations(path):
    assert resolve(read_yaml(path)).evaluation.sets


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} == {"evaluate_refcoco", "evaluate_screenspot"}
