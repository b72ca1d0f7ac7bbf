"""Who computes AdamW is chosen by what is there, said by name, and makes no difference."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megavg.parallel.context import ParallelContext
from megavg.parallel.optimizer import choose_implementation, make_optimizer
from megavg.protocols.options import OptimizerConfig

BUILT = (Path(os.environ.get("TORCH_EXTENSIONS_DIR", "none")) / "cpu_adam" / "cpu_adam.so").exists()
CPU = ParallelContext(1, 0, 1, 0, None, 1, 0, None, 1, 0, None, torch.device("cpu"))


@pytest.mark.parametrize("wanted, device, offload, has_apex, expected", [
    ("auto", "cpu", False, False, "torch"), ("auto", "cuda", False, False, "torch"),
    ("auto", "cuda", False, True, "apex"), ("auto", "cuda", True, True, "deepspeed"),
    ("auto", "cpu", True, False, "torch"), ("torch", "cuda", True, True, "torch"),
    ("deepspeed", "cuda", False, True, "deepspeed"), ("apex", "cuda", False, True, "apex"),
])
def test_choice(wanted, device, offload, has_apex, expected):
    assert choose_implementation(wanted, device, offload, has_apex) == expected


@pytest.mark.parametrize("device, offload, has_apex", [("cpu", False, True), ("cuda", True, True),
                                                       ("cuda", False, False)])
def test_apex_that_cannot_work_is_refused(device, offload, has_apex):
    with pytest.raises(ValueError, match="optimizer.implementation=apex needs NVIDIA apex .* use auto"):
        choose_implementation("apex", device, offload, has_apex)


@pytest.mark.skipif(not BUILT, reason="DeepSpeed's CPU Adam is not compiled, which takes minutes; "
                                      "optimizer.implementation=deepspeed compiles it at its first use")
def test_deepspeeds_adamw_is_torchs():
    weights, names = [], []
    for implementation in ("torch", "deepspeed"):
        torch.manual_seed(0)
        module = torch.nn.Linear(33, 17)
        optimizer, name = make_optimizer(module, OptimizerConfig(lr=1e-2, weight_decay=0.1,
                                                                 implementation=implementation), CPU, False)
        for _ in range(5):
            module(torch.randn(4, 33)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(module.weight.detach())
        names.append(name)
    assert names == ["torch AdamW", "DeepSpeedCPUAdam"]
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-5)


def test_vectors_do_not_decay_and_empty_groups_are_left_out():
    module = torch.nn.Linear(3, 2)
    groups = make_optimizer(module, OptimizerConfig(weight_decay=0.5), CPU, False)[0].param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.5), (1, 0.0)]
    module.bias.requires_grad_(False)
    assert len(make_optimizer(module, OptimizerConfig(), CPU, False)[0].param_groups) == 1
