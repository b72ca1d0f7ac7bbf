"""Train a Qwen-VL model: ``deepspeed megavg/train.py --config FILE [section.key=value ...]``."""

from __future__ import annotations

import os
import sys

if not __package__:  # started as a file: the repository root takes the place of this folder on the path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; 0, or 2 after an error that its message tells how to mend."""
    from megavg.parallel.quiet import quieten
    from megavg.trainer.config import parse_command_line

    try:
        config = parse_command_line(argv)
        quieten()
        from megavg.trainer.bad_data import BadData
        from megavg.trainer.trainer import Trainer

        trainer = Trainer(config)
    except (ValueError, OSError) as error:
        return _tell(error)
    try:
        trainer.run()
    except BadData as error:
        return _tell(error)
    return 0


def _tell(error: Exception) -> int:
    """What a user can mend gets one message and no traceback, unless MEGAVG_TRACEBACK=1 asks for it.

    A wrong option is seen by every rank alike and told by the first; a file may be missing on one machine alone.
    """
    if os.environ.get("MEGAVG_TRACEBACK") == "1":
        raise error
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 or isinstance(error, OSError):
        print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr)
    return 2


def _start() -> int:
    code = main()
    if "megavg.parallel.mcore" in sys.modules:  # not after a typo, for which torch is not loaded
        from megavg.parallel.mcore import stop_processes

        stop_processes()
    return code


if __name__ == "__main__":
    sys.exit(_start())
