"""Pure tensor functions. The vocabulary ops are useful on their own: ``from megavg.ops import token_scores,
VocabShard``.

They need nothing but torch, which is imported when the first of them is asked for.
"""

from __future__ import annotations

_HOMES = {"token_scores": "vocab_parallel", "VocabShard": "vocab_shard", "pair_divergence": "vocab_pair",
          "Blocks": "vocab_rows"}
_PROTOCOLS = {"HeadOptions": "options", "TokenScores": "batch", "PairScores": "batch"}

__all__ = sorted([*_HOMES, *_PROTOCOLS])


def __getattr__(name: str):
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(f"megavg.ops.{_HOMES[name]}"), name)
    if name in _PROTOCOLS:
        return getattr(import_module(f"megavg.protocols.{_PROTOCOLS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
