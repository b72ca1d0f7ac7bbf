"""What the entries share: errors that a user can mend end in one line, and processes part as friends."""

from __future__ import annotations

import os
import sys
from typing import Any, Callable


def run(parse: Callable[[], Any], make: Callable[[Any], Any]) -> int:
    """``make(parse()).run()``: its exit status, else 0; or 2 after an error whose message tells how to mend it.

    Args:
        parse: gives the configuration; it loads no torch, so that a typo is answered at once.
        make: gives what is to be run. A ValueError or OSError up to here is the user's to mend, later on only
            ``BadData`` and ``CheckpointError`` are: anything else is a fault and keeps its traceback.
    """
    try:
        config = parse()
        from megavg.parallel.quiet import quieten

        quieten()
        from megavg.checkpoint.errors import CheckpointError
        from megavg.trainer.bad_data import BadData

        made = make(config)
    except (ValueError, OSError) as error:
        return tell(error)
    try:
        status = made.run()
        return status if isinstance(status, int) else 0
    except (BadData, CheckpointError) as error:
        return tell(error)


def tell(error: Exception) -> int:
    """Print what a user can mend as one message, without a traceback unless MEGAVG_TRACEBACK=1 asks for it; 2.

    A wrong option is seen by every rank alike and told by the first; a file may be missing on one machine alone.
    """
    if os.environ.get("MEGAVG_TRACEBACK") == "1":
        raise error
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 or isinstance(error, OSError):
        print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr)
    return 2


def part(code: int) -> int:
    """Leave the process group, where there is one, as the last thing a process does; returns ``code``."""
    if "megavg.parallel.mcore" in sys.modules:  # not after a typo, for which torch is not loaded
        from megavg.parallel.mcore import stop_processes

        stop_processes()
    return code
