"""Advantages inside a group of answers to one prompt."""

from __future__ import annotations

import torch


def group_advantages(rewards: torch.Tensor, group_size: int, normalize_std: bool, eps: float) -> torch.Tensor:
    """Reward minus the mean of its group, divided by (std + eps) on request; [B] -> [B].

    Groups are ``group_size`` neighbouring rows; the standard deviation is the unbiased one. A group whose rewards are
    all equal gets exactly zero.
    """
    if group_size < 1 or rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards do not make whole groups of group_size={group_size}")
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    equal = (groups == groups[:, :1]).all(1, keepdim=True)
    centred = centred.masked_fill(equal, 0.0)  # the mean of equal numbers may be off by a rounding
    if normalize_std and group_size > 1:
        centred = centred / (groups.std(1, keepdim=True) + eps)
    return centred.view(-1)
