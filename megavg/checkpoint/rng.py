"""The state of every generator of random numbers of a process, as plain JSON.

megavg itself draws from generators that it derives from (seed, step, sample, answer) and needs none of this; plug-ins
may.
"""

from __future__ import annotations

import base64
import random

import torch


def rng_state() -> dict:
    """The generators of Python, numpy, torch and this process' GPU."""
    import numpy

    version, numbers, gauss = random.getstate()
    kind, keys, *rest = numpy.random.get_state()
    state = {"python": [version, list(numbers), gauss], "numpy": [kind, keys.tolist(), *rest],
             "torch": _text(torch.get_rng_state())}
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state())
    return state


def set_rng_state(state: dict) -> None:
    """Continue from what ``rng_state`` gave."""
    import numpy

    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
