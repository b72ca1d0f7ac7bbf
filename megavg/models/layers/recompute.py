"""Activation recomputation: keep a block's input, and run the block again in the backward."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_in_backward(block: nn.Module) -> None:
    """Have ``block`` keep nothing but its inputs for the backward.

    The forward is wrapped inside of the module, so hooks on the module run once: ZeRO-3 gathers the block for its
    backward before anything is recomputed, and would gather it a second time if its forward hooks ran again.
    """
    forward = block.forward

    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    block.forward = run
