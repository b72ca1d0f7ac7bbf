"""DeepSpeed ZeRO-3 as this project uses it: its configuration, its optimiser, and the undocumented names relied on."""

from __future__ import annotations

import contextlib
from typing import Iterator

import torch
from torch import nn

from megavg.parallel.context import ParallelContext
from megavg.protocols.options import OptimizerConfig, ZeroConfig

_GATHER_BYTES = 256 * 2**20


def deepspeed_config(zero: ZeroConfig, gradient_clipping: float, dtype: torch.dtype) -> dict:
    """The DeepSpeed configuration of a run. Gradient accumulation is ours, so DeepSpeed is told of none."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": gradient_clipping,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": zero.overlap_comm,
            "contiguous_gradients": False,
            "reduce_bucket_size": zero.reduce_bucket_size,
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_param_persistence_threshold": zero.param_persistence_threshold,
            "stage3_max_live_parameters": int(1e9),
            "stage3_max_reuse_distance": 0,
            # one sub-group: the norm's all-reduce spans stages, which must all make the same number of them
            "sub_group_size": int(1e12),
        },
    }
    if dtype == torch.bfloat16:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def make_optimizer(module: nn.Module, config: OptimizerConfig, context: ParallelContext) -> torch.optim.Optimizer:
    """AdamW in two groups: matrices decay, vectors (norms, biases) do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps,
                             fused=context.device.type == "cuda")


def gather_as_one(blocks: list[nn.Module]) -> None:
    """Have ZeRO-3 gather each block's parameters in one collective, not module by module.

    Without this every linear and norm has its own hooks, about a quarter of the step time of the demo's model.
    """
    from deepspeed.utils import set_z3_leaf_module

    for block in blocks:
        set_z3_leaf_module(block, True)


def forget_backward(engine) -> None:
    """Tell DeepSpeed that another backward of the same step follows; without it the second one loses gradients."""
    clear = getattr(engine.optimizer, "clear_backward_seen_flag", None)
    if clear is None:
        import deepspeed

        raise RuntimeError(f"deepspeed {deepspeed.__version__} has no clear_backward_seen_flag, which gradient "
                           "accumulation under ZeRO-3 needs; install the version pinned in requirements.txt")
    clear()


def remove_world_broadcast(engine) -> None:
    """Drop ZeRO-3's root pre-forward hook, whose world-wide broadcast hangs pipeline stages."""
    hook = getattr(getattr(engine.optimizer, "parameter_offload", None), "fwd_pre_hook", None)
    if hook is None:
        raise RuntimeError("this deepspeed has no optimizer.parameter_offload.fwd_pre_hook; install the version "
                           "pinned in requirements.txt")
    hook.remove()


def gathered(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Walk over a partitioned module's parameters whole (this rank's tensor-parallel shard), some at a time.

    A tensor is valid only until the next one is asked for. All data-parallel ranks must walk together.
    """
    import deepspeed

    group: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in module.named_parameters():
        group.append((name, parameter))
        size += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if size >= _GATHER_BYTES:
            with deepspeed.zero.GatheredParameters([p for _, p in group]):
                yield from ((n, p.detach()) for n, p in group)
            group, size = [], 0
    with deepspeed.zero.GatheredParameters([p for _, p in group]) if group else contextlib.nullcontext():
        yield from ((n, p.detach()) for n, p in group)
