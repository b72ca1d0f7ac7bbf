"""What every algorithm of the folder owes the trainer, and the command line."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megavg.algorithms.base import Algorithm
from megavg.protocols.batch import TokenScores
from megavg.protocols.config import build, to_tree
from megavg.protocols.plugin import names_in
from megavg.trainer.config import algorithm_class
from megavg.trainer.step import make_signal
from tests.rollout_batches import random_batch

MODULES = names_in("megavg.algorithms")
JOINS = ["two_stage+dapo", "top_entropy+dapo", "ecvgpo+gspo", "clip_cov+dr_grpo+papo", "adaptive_entropy+cispo",
         "vepo+kl_cov", "examples.custom_algorithm", "examples.custom_algorithm+saei+sapo"]
NAMES = MODULES + JOINS
ROOT = Path(__file__).resolve().parents[2]


def make(name: str) -> Algorithm:
    cls = algorithm_class(name)
    return cls(build(cls.Config, {}, "algorithm"))


def signal_of(algorithm: Algorithm, seed: int = 0):
    """(batch, stats, signal) as the trainer makes them; a method that learns from written answers gets no scores."""
    batch, stats = random_batch(seed)
    stats = stats if algorithm.uses_rollouts else None
    reference = None
    if getattr(algorithm.config, "kl_coefficient", 0.0):
        reference = torch.rand(batch.mask.shape) - 2
    return batch, stats, make_signal(algorithm, batch, stats, reference, progress=0.5)


def test_the_folder_holds_the_algorithms_of_this_version():
    assert {"adaptive_entropy", "cispo", "clip_cov", "dapo", "dr_grpo", "ecvgpo", "grpo", "gspo", "kl_cov",
            "noisy_rollout", "papo", "saei", "sapo", "sft", "top_entropy", "two_stage", "vepo"} == set(MODULES)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_documented_and_says_where_it_comes_from(name):
    cls = algorithm_class(name)
    assert issubclass(cls, Algorithm) and cls.__doc__.strip()
    assert cls.mark in ("[exact]", "[reported]", "[ours]")
    assert cls.mark in cls.__doc__, "the docstring and the log line must carry the same mark"


@pytest.mark.parametrize("name", NAMES)
def test_config_is_frozen_documented_and_has_defaults(name):
    config = make(name).config
    fields = dataclasses.fields(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, fields[0].name, 1)
    documentation = " ".join(cls.__doc__ or "" for cls in type(config).__mro__ if cls is not object)
    undocumented = [f.name for f in fields if not re.search(rf"\b{f.name}\b", documentation)]
    assert not undocumented
    assert build(type(config), json.loads(json.dumps(to_tree(config))), "algorithm") == config


@pytest.mark.parametrize("name", NAMES)
def test_advantages_and_weights(name):
    algorithm = make(name)
    batch, stats, signal = signal_of(algorithm)
    for values in (signal.advantages, signal.weights):
        assert values.shape == batch.mask.shape and values.isfinite().all() and not values.requires_grad
        assert (values[~batch.mask] == 0).all() and values.abs().sum() > 0
    assert (signal.weights >= 0).all()
    assert all(isinstance(value, float) for value in algorithm.metrics.values())
    assert signal.entropy_weights.shape == batch.mask.shape and signal.entropy_weights.isfinite().all()
    assert (signal.entropy_weights[~batch.mask] == 0).all()
    assert (signal.coefficients >= 0).all() and (signal.coefficients[~batch.mask] == 0).all()
    for values in signal.extra.values():
        assert values.shape == batch.mask.shape and not values.requires_grad
    assert signal.extra.keys() == signal.rows(2, 5).extra.keys()
    assert isinstance(algorithm.resampling_tries, int) and algorithm.resampling_tries >= 0


@pytest.mark.parametrize("name", NAMES)
def test_it_leaves_the_batch_as_it_was(name):
    algorithm = make(name)
    batch, stats = random_batch()
    tensors = (batch.mask, batch.rewards, stats.logprobs, stats.entropy, *vars(stats.perturbed).values())
    before = [tensor.clone() for tensor in tensors]
    make_signal(algorithm, batch, stats, None, 0.5)
    assert all(torch.equal(*pair) for pair in zip(before, tensors))


@pytest.mark.parametrize("name", NAMES)
def test_token_loss_has_a_gradient_where_there_are_tokens_and_nowhere_else(name):
    algorithm = make(name)
    batch, _, signal = signal_of(algorithm)
    logprobs = (-3 * torch.rand(batch.mask.shape) * batch.mask).requires_grad_()
    entropy = torch.rand(batch.mask.shape)
    loss = algorithm.token_loss(TokenScores(logprobs, entropy), signal)
    assert loss.shape == batch.mask.shape and loss.isfinite().all()
    (signal.coefficients * signal.weights * loss).sum().backward()
    assert logprobs.grad.isfinite().all() and logprobs.grad.abs().sum() > 0
    assert (logprobs.grad[~batch.mask] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_json(name):
    first, second = make(name), make(name)
    signal_of(first)
    state = first.state_dict()
    second.load_state_dict(json.loads(json.dumps(state)))
    assert second.state_dict() == state
    assert torch.equal(signal_of(first, seed=1)[2].advantages, signal_of(second, seed=1)[2].advantages)


def test_importing_them_leaves_torch_alone():
    code = ("import sys\n"
            "from megavg.trainer.config import algorithm_class\n"
            f"for name in {NAMES!r}:\n"
            "    algorithm_class(name).Config()\n"
            "    assert 'torch' not in sys.modules, name\n")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
