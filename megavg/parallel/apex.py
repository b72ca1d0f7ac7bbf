"""NVIDIA's apex, where it is installed; the package of that name on the public index is another thing."""

from __future__ import annotations

import functools


@functools.cache
def has_nvidia_apex() -> bool:
    """Whether NVIDIA's apex with its fused optimiser and norms can be imported."""
    try:
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine  # noqa: F401
        from apex.optimizers import FusedAdam  # noqa: F401
    except ImportError:
        return False
    return True
