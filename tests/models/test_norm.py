"""The fused RMSNorm is the plain one, and apex is taken only where it is NVIDIA's."""

from __future__ import annotations

import sys
import types

import torch

from megavg.models.layers.norm import plain_rms_norm, rms_norm_name, torch_rms_norm
from megavg.parallel.apex import has_nvidia_apex


def test_fused_equals_plain_with_gradients():
    x, weight = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 7, 16), (16,)))
    results = []
    for norm in (plain_rms_norm, torch_rms_norm):
        leaves = [t.float().clone().requires_grad_() for t in (x, weight)]
        out = norm(*leaves, 1e-6)
        out.square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, fused in zip(*results):
        torch.testing.assert_close(ours, fused, atol=1e-5, rtol=1e-5)


def test_another_package_named_apex_is_not_taken(monkeypatch):
    """PyPI's apex is a web toolkit: it has neither fused norms nor a fused optimiser."""
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    has_nvidia_apex.cache_clear()
    rms_norm_name.cache_clear()
    assert not has_nvidia_apex()
    assert rms_norm_name("cuda") == "torch (fused)" and rms_norm_name("cpu") == "torch"
    has_nvidia_apex.cache_clear()
    rms_norm_name.cache_clear()
