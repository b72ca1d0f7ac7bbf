"""AdamW from whoever computes it fastest here: NVIDIA apex, DeepSpeed or torch."""

from __future__ import annotations

import torch
from torch import nn

from megavg.parallel.apex import has_nvidia_apex
from megavg.parallel.context import ParallelContext
from megavg.parallel.stale_locks import stale_locks_removed
from megavg.protocols.options import OptimizerConfig


def choose_implementation(wanted: str, device: str, offload: bool, has_apex: bool) -> str:
    """The implementation that ``optimizer.implementation`` stands for on this machine: torch, deepspeed or apex.

    Raises:
        ValueError: the one that was asked for cannot work here.
    """
    if wanted == "apex":
        if not has_apex or device != "cuda" or offload:
            raise ValueError("optimizer.implementation=apex needs NVIDIA apex (not the package of that name on PyPI), "
                             "a GPU and an optimiser that is not offloaded; use auto")
        return "apex"
    if wanted != "auto":
        return wanted
    if offload and device == "cuda":
        return "deepspeed"
    return "apex" if has_apex and device == "cuda" else "torch"


def make_optimizer(module: nn.Module, config: OptimizerConfig, context: ParallelContext,
                   offload: bool) -> tuple[torch.optim.Optimizer, str]:
    """(AdamW, who computes it), in two groups: matrices decay, vectors (norms, biases) do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    device = context.device.type
    choice = choose_implementation(config.implementation, device, offload, device == "cuda" and has_nvidia_apex())
    options = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if choice == "apex":
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **options), "NVIDIA apex FusedAdam"
    if choice == "deepspeed" and (offload or device == "cpu"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        with stale_locks_removed():
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **options), "DeepSpeedCPUAdam"
    if choice == "deepspeed":
        from deepspeed.ops.adam import FusedAdam

        with stale_locks_removed():
            return FusedAdam(groups, adam_w_mode=True, **options), "DeepSpeed FusedAdam"
    fused = device == "cuda" and not offload
    return torch.optim.AdamW(groups, fused=fused, **options), f"torch AdamW{' (fused)' if fused else ''}"
