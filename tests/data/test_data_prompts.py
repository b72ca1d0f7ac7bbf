"""The questions: every family has one for every task, and the configuration's go before them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megavg.data.prompts import NAMES, Prompts, read_texts
from megavg.protocols.sample import TASKS, Sample

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "megavg" / "data" / "prompt_texts"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def sample(task: str = "rec", expression: str = "the {red} cup's \"handle\"") -> Sample:
    return Sample("k", "s.tar", None, 9, 9, expression, (), {}, task)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_its_own_text_for_every_task(family):
    texts = read_texts(FOLDER / f"{family}.yaml")
    assert set(texts) == set(NAMES) and len(set(texts.values())) == len(NAMES)
    for thinking in (False, True):
        prompts = Prompts(family, thinking=thinking)
        for task in TASKS:
            question = prompts.question(sample(task))
            assert question.count("the {red} cup's \"handle\"") == 1, "braces in an expression are left alone"
            assert ("<think>" in question and "<answer>" in question) == thinking
            assert prompts.sources[task] == f"{family}.yaml" and "{{" not in question and "\n\n" not in question


def test_every_text_says_where_it_comes_from():
    for family in FAMILIES:
        lines = (FOLDER / f"{family}.yaml").read_text().splitlines()
        for name in NAMES:
            at = next(i for i, line in enumerate(lines) if line.startswith(f"{name}:"))
            comment = []
            while lines[at - 1 - len(comment)].startswith("#"):
                comment.append(lines[at - 1 - len(comment)])
            assert any(mark in " ".join(comment) for mark in ("[exact]", "[reported]", "[ours]")), f"{family} {name}"


def test_families_ask_for_their_own_format():
    questions = {family: Prompts(family).question(sample("rec", "it")) for family in FAMILIES}
    assert questions["qwen2_vl"] == "Find <|object_ref_start|>it<|object_ref_end|>"
    assert "JSON" in questions["qwen2_5_vl"] and "JSON" in questions["qwen3_vl"]


def test_what_goes_before_what(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("rec: From a file, {expression}.\nrec_think: Think of {expression} from a file.\n"
                    "point: 'A point, {{\"x\": 1}}, {expression}.'\n")
    own = Prompts("qwen3_vl")
    from_file = Prompts("qwen3_vl", prompts_file=str(file))
    assert from_file.question(sample("rec", "it")) == "From a file, it."
    assert from_file.question(sample("point", "it")) == 'A point, {"x": 1}, it.'
    assert from_file.texts["detection"] == own.texts["detection"] and from_file.sources["rec"] == str(file)
    thinking = Prompts("qwen3_vl", prompts_file=str(file), thinking=True)
    assert thinking.question(sample("rec", "it")) == "Think of it from a file."
    assert thinking.texts["point"] == Prompts("qwen3_vl", thinking=True).texts["point"]
    by_task = Prompts("qwen3_vl", prompts={"rec": "By task, {expression}."}, prompts_file=str(file))
    assert by_task.question(sample("rec", "it")) == "By task, it." and by_task.sources["rec"] == "data.prompts"
    assert by_task.texts["point"] == from_file.texts["point"]
    one = Prompts("qwen3_vl", "Always {expression}.", {"rec": "By task, {expression}."}, str(file))
    assert {one.question(sample(task, "it")) for task in TASKS} == {"Always it."}


@pytest.mark.parametrize("options, words", [
    ({"prompt": "Where is it?"}, "data.prompt='Where is it?' cannot be filled in (it does not hold {expression})"),
    ({"prompt": "{expression} {image}"}, "write {expression} where the expression goes and double every other brace"),
    ({"prompts": {"rec": "{expression.x}"}}, "data.prompts.rec='{expression.x}' cannot be filled in"),
    ({"prompts": {"rec": 5}}, "data.prompts.rec=5 cannot be filled in"),
    ({"prompts": {"pint": "{expression}"}}, "data.prompts: there is no task 'pint' (did you mean 'point'?)"),
    ({"prompts": {"rec_think": "{expression}"}}, "data.prompts: there is no task 'rec_think'"),
])
def test_wrong_texts(options, words):
    with pytest.raises(ValueError) as caught:
        Prompts("qwen3_vl", **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content, words", [
    (None, "cannot read the prompts of"), ("rec: [", "cannot read the prompts of"), ("- a", "got list"),
    ("", "got NoneType"), ("rex: '{expression}'", "there is no task 'rex' (did you mean 'rec'?)"),
    ("rec: what?", "rec='what?' cannot be filled in"), (b"rec: \xff", "cannot read the prompts of")])
def test_wrong_files(tmp_path, content, words):
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as caught:
        Prompts("qwen3_vl", prompts_file=str(file))
    assert words in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_family_without_texts_needs_some():
    with pytest.raises(ValueError, match="there is no prompt 'rec' for the family 'other'; give data.prompt"):
        Prompts("other")
    assert Prompts("other", "See {expression}").question(sample("point", "it")) == "See it"


def test_the_texts_are_part_of_the_package():
    project = (ROOT / "pyproject.toml").read_text()
    assert "data/prompt_texts/*.yaml" in project


def test_nothing_heavy_is_loaded():
    code = ("import sys; from megavg.data.prompts import Prompts; Prompts('qwen3_vl')\n"
            "assert not {'torch', 'PIL', 'numpy', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_what_a_run_wrote_reads_back(tmp_path):
    from megavg.trainer.prompt_log import write_prompts

    text = "Ünïcode 😀, a \"quote\" and: {{braces}}\n{expression}" + " word" * 60
    for thinking in (False, True):
        prompts = Prompts("qwen2_5_vl", prompts={"rec": text}, thinking=thinking)
        write_prompts(prompts, tmp_path / "prompts.yaml")
        again = Prompts("qwen2_5_vl", prompts_file=str(tmp_path / "prompts.yaml"), thinking=thinking)
        assert again.texts == prompts.texts and set(again.sources.values()) == {str(tmp_path / "prompts.yaml")}
        assert set(yaml.safe_load((tmp_path / "prompts.yaml").read_text())) <= set(NAMES)
        assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("name, thinking", [("rec_think", False), ("rec", True)])
def test_a_file_of_the_other_kind_is_not_passed_over_in_silence(tmp_path, name, thinking):
    (tmp_path / "own.yaml").write_text(f'{name}: "Find {{expression}}."\n')
    with pytest.raises(ValueError, match=r"own.yaml holds no text for data.thinking.*set data.thinking="):
        Prompts("qwen3_vl", prompts_file=str(tmp_path / "own.yaml"), thinking=thinking)
    assert Prompts("qwen3_vl", prompts_file=str(tmp_path / "own.yaml"), thinking=not thinking).sources["rec"]
