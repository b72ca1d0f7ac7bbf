"""The example of an algorithm outside the package goes the way of all others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megavg.protocols.config import ConfigError
from megavg.trainer.config import algorithm_class, resolve
from tests.algorithms.slow_losses import Plain, assert_equals_loops, group_advantages, moved
from tests.rollout_batches import random_batch

ROOT = Path(__file__).resolve().parents[2]
NAME = "examples.custom_algorithm"


def configured(**options):
    tree = {"model": {"path": "."}, "data": {"shards": ["*.tar"]}, "trainer": {"output_dir": "."},
            "algorithm": {"name": NAME, **options}}
    return algorithm_class(NAME)(resolve(tree).algorithm)


@pytest.mark.parametrize("options", [{}, {"worse_answers": 0.25}])
def test_equals_loops(options):
    batch, stats = random_batch(1, dtype=torch.float64)

    def slow(plain: Plain) -> float:
        plain.advantages = [a if a > 0 else a * options.get("worse_answers", 0.0)
                            for a in group_advantages(plain.rewards, plain.group_size)]
        return plain.loss(plain.clipped)

    algorithm, signal, _ = assert_equals_loops(lambda: configured(**options), batch, stats,
                                               moved(stats, batch.mask, 0.3), slow)
    worse = (signal.advantages < 0).sum() / batch.mask.sum()
    assert 0.2 < algorithm.metrics["positive_only/worse_tokens"] == pytest.approx(float(worse))


def test_its_options_are_checked():
    with pytest.raises(ConfigError, match="worse_answers=2.0 must be in 0..1"):
        configured(worse_answers=2.0)
    with pytest.raises(ConfigError, match="did you mean 'worse_answers'"):
        configured(worse_answer=0.5)


def test_the_command_line_finds_it_from_any_folder(tmp_path):
    """An option that is wrong is answered by the method's own check, from another working directory."""
    command = [sys.executable, str(ROOT / "megavg" / "train.py"), "--config", str(ROOT / "examples" / "demo.yaml"),
               f"algorithm.name={NAME}", "algorithm.worse_answers=3"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "worse_answers=3.0 must be in 0..1" in result.stderr
