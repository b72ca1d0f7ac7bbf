"""Compile what DeepSpeed compiles at its first use, so that no run waits for it, and say which torch there is."""

from __future__ import annotations

import os
import sys
import time

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main() -> int:
    import torch

    gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else "no GPU"
    print(f"torch {torch.__version__}, {gpus}; compiling DeepSpeed's shared-memory communication for the CPU "
          "(about a minute, once) ...", flush=True)
    started = time.monotonic()
    os.environ["DS_ACCELERATOR"] = "cpu"  # the tests run on the CPU on every machine
    from megavg.parallel.mcore import start_processes

    start_processes()
    print(f"ready after {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
