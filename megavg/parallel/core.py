"""What is used of megatron-core, imported without the compiler: import it from here."""

from __future__ import annotations

import torch


def _as_it_is(function=None, **options):
    """Stands for ``torch.compile``."""
    return (lambda decorated: decorated) if function is None else function


# megatron-core has torch compile its fused activations and losses when it is imported; none of them is used here, and
# loading the compiler is a third of the time that every process takes to start
_compile, torch.compile = torch.compile, _as_it_is
try:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.model_parallel_config import ModelParallelConfig
finally:
    torch.compile = _compile

__all__ = ["ModelParallelConfig", "parallel_state", "tensor_parallel"]
