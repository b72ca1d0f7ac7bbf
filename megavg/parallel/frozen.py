"""A trained stage under ZeRO-3 that computes without giving its parameters a gradient, for the pixels' sake."""

from __future__ import annotations

import contextlib
from typing import Iterator

from torch import nn


@contextlib.contextmanager
def frozen(stage: nn.Module) -> Iterator[None]:
    """Keep every parameter from receiving a gradient, and DeepSpeed from accumulating one.

    At the end of the backward of a block that it gathers as one piece DeepSpeed takes the gradients of all its
    parameters, and takes zeros for those that have none: it would overwrite what earlier backwards of a step have
    accumulated. So these hooks are set aside, and back in place afterwards.
    """
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    hooks = [(module._backward_hooks, dict(module._backward_hooks)) for module in stage.modules()
             if module._backward_hooks]
    for parameter in trained:
        parameter.requires_grad_(False)
    for registered, _ in hooks:
        registered.clear()
    try:
        yield
    finally:
        for registered, kept in hooks:
            registered.update(kept)
        for parameter in trained:
            parameter.requires_grad_(True)


def release_leftovers(engine) -> None:
    """Release what a backward beside DeepSpeed's engine has left gathered; the engine's own does it at its end."""
    # without an optimiser DeepSpeed puts the owner of the method in its place
    getattr(engine.optimizer, "parameter_offload", engine.optimizer).release_backward_leftovers()
