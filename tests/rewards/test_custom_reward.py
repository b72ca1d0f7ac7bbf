"""Plug-ins outside the package: by dotted name and by file, the example of a reward, and errors that name the file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megavg.protocols.plugin import load_module
from megavg.protocols.sample import RELATIVE_1000, Completion, Frame, RewardResult, Sample
from megavg.rewards.base import load_rewards, score
from megavg.trainer.config import algorithm_class

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "examples" / "custom_reward.py"
SAMPLE = Sample("k0", "", None, 300, 400, "it", ((100.0, 100.0, 200.0, 200.0),))  # its diagonal is 500 pixels long


def judged(name: str, text: str, **options) -> RewardResult:
    completion = Completion(text, "json_relative_1000", Frame(RELATIVE_1000, 300, 400, 300, 400))
    _, results = score(completion, SAMPLE, load_rewards([{"name": name, **options}]))
    return results["custom_reward" if name.endswith(".py") else name]


@pytest.mark.parametrize("name", [str(FILE), "examples/custom_reward.py", "./examples/../examples/custom_reward.py",
                                  "examples.custom_reward"])
def test_the_example_is_loaded_by_file_and_by_dotted_name(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    # Middles: (150, 150) and (150, 200) pixels, 50 of 500 apart.
    assert judged(name, '{"bbox_2d": [400, 400, 600, 600]}') == RewardResult(pytest.approx(1 - 0.1 / 0.25), "ok")
    assert judged(name, '{"bbox_2d": [400, 400, 600, 600]}', falls_to_zero_at=0.05) == RewardResult(0.0, "too far")
    assert judged(name, "there") == RewardResult(0.0, "no JSON")
    with pytest.raises(ValueError, match="did you mean 'falls_to_zero_at'"):
        judged(name, "", fall_to_zero_at=0.5)
    with pytest.raises(ValueError, match="expected 0 < share <= 1, got 2.0"):
        judged(name, "", falls_to_zero_at=2.0)


def test_a_file_listed_twice_is_one_module_and_two_terms():
    terms = load_rewards([{"name": str(FILE)}, {"name": str(FILE), "falls_to_zero_at": 0.5}])
    assert [term.name for term in terms] == ["custom_reward", "custom_reward_2"]
    assert terms[0].function is terms[1].function


def test_files_of_one_name_are_two_modules(tmp_path):
    code = ("from dataclasses import dataclass\nfrom megavg.protocols.sample import RewardResult\n\n"
            "@dataclass\nclass Value:\n    number: float = {}\n\n"
            "def reward(completion, sample):\n    return RewardResult(Value().number, 'ok')\n")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(code.format(0.25 if folder == "a" else 0.5))
    terms = load_rewards([{"name": str(tmp_path / folder / "mine.py")} for folder in ("a", "b")])
    assert [term.function(None, None).score for term in terms] == [0.25, 0.5]


def test_an_algorithm_is_loaded_by_file_too(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert algorithm_class("examples/custom_algorithm.py").__name__ == "PositiveOnly"


def test_errors_name_the_option_and_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("def reward(:\n")
    Path("stops.py").write_text("1 / 0\n")
    Path("empty.py").write_text("")
    Path("folder.py").mkdir()
    for name, message in (("missing.py", "there is no file"), ("folder.py", "there is no file"),
                          ("broken.py", "SyntaxError"), ("stops.py", "ZeroDivisionError")):
        with pytest.raises(ValueError, match=message) as error:
            load_module("megavg.rewards", name, "rewards[0].name")
        assert f"rewards[0].name={name!r}" in str(error.value) and str(tmp_path / name) in str(error.value)
    with pytest.raises(ValueError, match="empty.py holds no function named reward"):
        load_rewards([{"name": "empty.py"}])


@pytest.mark.parametrize("content, message", [
    ("def reward(:\n", "SyntaxError"), ("import sys\nsys.exit(3)\n", "SystemExit: 3"), ("1 / 0\n", "ZeroDivisionError"),
    ("from json import nothing_of_the_kind\n", "ImportError"),
])
def test_a_module_that_fails_is_named_by_file_and_by_dotted_name(content, message, tmp_path, monkeypatch):
    package = tmp_path / "rewards_that_fail"
    package.mkdir()
    (package / "mine.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        for name in ("rewards_that_fail.mine", str(package / "mine.py")):
            with pytest.raises(ValueError, match=f"fails while it is loaded: {message}") as error:
                load_module("megavg.rewards", name, "rewards[0].name")
            assert f"rewards[0].name={name!r}" in str(error.value)
    finally:
        sys.modules.pop("rewards_that_fail", None)


def test_annotations_and_checks_that_fail_are_named(tmp_path):
    (tmp_path / "hints.py").write_text("from __future__ import annotations\n\ndef reward(completion: Foo, sample):\n"
                                       "    pass\n")
    (tmp_path / "check.py").write_text("def reward(completion, sample, *, a=1):\n    pass\n\n"
                                       "def check_options():\n    pass\n")
    with pytest.raises(ValueError, match="annotations of reward cannot be read .NameError: name 'Foo'"):
        load_rewards([{"name": str(tmp_path / "hints.py")}])
    with pytest.raises(ValueError, match="check_options fails: TypeError"):
        load_rewards([{"name": str(tmp_path / "check.py"), "a": 2}])


def test_the_command_line_takes_a_file(tmp_path):
    """A wrong option of the example's reward is answered by its own check, before torch is loaded."""
    (tmp_path / "mine.py").write_text(FILE.read_text())
    command = [sys.executable, str(ROOT / "megavg" / "train.py"), "--config", str(ROOT / "examples" / "demo.yaml"),
               "rewards=[{name: mine.py, falls_to_zero_at: 3.0}]"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "expected 0 < share <= 1, got 3.0" in result.stderr
