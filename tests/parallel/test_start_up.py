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


def test_every_group_has_the_time_out_that_was_asked_for():
    assert run_ranks(2, _time_outs) == [{150.0}] * 2


def _time_outs() -> set[float]:
    """Seconds of the time-outs of all groups that a run makes beside the one it starts with."""
    import torch.distributed as dist

    from megavg.checkpoint.train_state import Checkpoints
    from megavg.parallel.mcore import make_context

    there = set(dist.distributed_c10d._world.pg_map)
    context = make_context(2, 1, torch.device("cpu"), timeout_minutes=2.5)
    Checkpoints("unused", context, timeout_minutes=2.5)
    dist.barrier()  # rank 0's store has to outlive the others' groups
    made = [group for group in dist.distributed_c10d._world.pg_map if group not in there]
    assert len(made) > 3
    return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in made}


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
