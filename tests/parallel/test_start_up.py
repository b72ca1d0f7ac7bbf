"""What cannot work is refused at the start, on every rank alike, with the remedy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megavg.parallel.zero import check_deepspeed, check_equal_groups
from tests.distributed import run_ranks


def test_this_deepspeed_has_the_undocumented_names():
    check_deepspeed()


def test_a_deepspeed_that_cannot_forget_a_backward_is_refused(monkeypatch):
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    for cls in (ZeROOptimizer, DeepSpeedZeroOptimizer_Stage3):
        for base in cls.__mro__:
            if "clear_backward_seen_flag" in vars(base):
                monkeypatch.delattr(base, "clear_backward_seen_flag")
    with pytest.raises(ValueError, match="has no clear_backward_seen_flag in its ZeRO-3; install the version pinned"):
        check_deepspeed()


@pytest.mark.parametrize("place, name", [("setup_zero_stage3_hooks", "fwd_pre_hook"),
                                         ("__init__", "ds_inflight_param_registry")])
def test_a_deepspeed_with_other_hooks_is_refused(monkeypatch, place, name):
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    monkeypatch.setattr(DeepSpeedZeRoOffload, place, lambda self: None)
    with pytest.raises(ValueError, match=f"has no {name} in its ZeRO-3; install the version pinned in requirements.txt"):
        check_deepspeed()


def test_stages_with_unequal_optimiser_groups_are_refused():
    messages = run_ranks(2, _unequal_groups)
    assert messages[0] == messages[1]
    assert messages[0].startswith("the pipeline stages train [2, 1] groups of parameters")
    assert "freeze less, or divide parallel.pipeline_layers otherwise" in messages[0]


def _unequal_groups() -> str:
    from megavg.parallel.mcore import make_context
    from megavg.parallel.optimizer import make_optimizer
    from megavg.protocols.options import OptimizerConfig

    context = make_context(1, 2, torch.device("cpu"))
    stage = nn.Linear(2, 2, bias=context.is_first_stage)
    optimizer, _ = make_optimizer(stage, OptimizerConfig(), context, offload=False)
    with pytest.raises(ValueError) as caught:
        check_equal_groups(optimizer, context)
    return str(caught.value)
