"""Keep the libraries' chatter off the console, so that what matters is seen. Standard library only."""

from __future__ import annotations

import logging
import warnings


def quieten() -> None:
    """Silence what every start prints and no user can act on; call it before deepspeed or megatron is imported."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives under names that torch has begun to rename, once per call
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # "Transformer Engine and Apex are not installed", from five modules
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(megatron|deepspeed)\.")
