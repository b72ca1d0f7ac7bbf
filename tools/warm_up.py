"""Compile what DeepSpeed compiles at its first use, so that no run waits for it, and say which torch there is."""

from __future__ import annotations

import os
import sys
import time

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main() -> int:
    import torch

    if torch.cuda.is_available():
        print(f"torch {torch.__version__} with {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
        return 0
    print(f"torch {torch.__version__} on the CPU; compiling DeepSpeed's shared-memory communication "
          "(about a minute, once) ...", flush=True)
    started = time.monotonic()
    from megavg.parallel.mcore import start_processes

    os.environ["MASTER_PORT"] = "0"  # alone: any free port
    start_processes()
    print(f"ready after {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
