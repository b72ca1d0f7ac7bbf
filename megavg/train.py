"""Train a Qwen-VL model: ``deepspeed megavg/train.py --config FILE [section.key=value ...]``."""

from __future__ import annotations

import os
import sys

if not __package__:  # started as a file: the repository root takes the place of this folder on the path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; 0, or 2 after an error that its message tells how to mend."""
    from megavg.trainer.config import parse_command_line
    from megavg.trainer.entry import run

    def make(config):
        from megavg.trainer.trainer import Trainer

        return Trainer(config)

    return run(lambda: parse_command_line(argv), make)


def _start() -> int:
    code = main()
    from megavg.trainer.entry import part

    return part(code)


if __name__ == "__main__":
    sys.exit(_start())
