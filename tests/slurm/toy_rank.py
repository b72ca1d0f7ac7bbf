"""A rank without a model: ``toy_rank.py BEHAVIOUR``; it waits for what the test does to it, at most a minute.

obey: exits with status 75 when it is asked to leave, as the trainer does; rank 0 takes longer.
early: has no handler yet, as in a trainer's start-up.
deaf: goes on whatever it is sent, as in a collective that never ends; the last rank crashes.
done: ends well.
wrong: all ranks end with status 2, and rank 0 says why.
once: crashes at the first start, and ends well at the second.
hung: ends as a hang is ended by the watchdog at the first start, and well at the second.
stuck: ends so at every start, and keeps something new in the first.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

STOPPED, HUNG, WRONG = 75, 76, 2


def main(behaviour: str) -> int:
    """Behave; the exit status."""
    rank, start, received = int(os.environ["RANK"]), int(os.environ.get("SLURM_RESTART_COUNT", 0)), []
    last = rank == int(os.environ["WORLD_SIZE"]) - 1
    if behaviour in ("obey", "deaf"):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: received.append(signal.Signals(number).name))
    names = ("WORLD_SIZE", "LOCAL_RANK", "SLURMD_NODENAME", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES")
    print(f"rank {rank} is up:", *(f"{name}={os.environ.get(name)}" for name in names))
    if behaviour == "wrong":
        if rank == 0:
            time.sleep(0.3)
            print("error: this is what to mend", file=sys.stderr)
        return WRONG
    if behaviour == "done" or behaviour in ("once", "hung") and start:
        return 0
    if behaviour == "stuck" and rank == 0 and not start:
        Path("kept").touch()
    if behaviour in ("hung", "stuck"):
        print("hang: rank 1 has not entered all_reduce", file=sys.stderr)
        return HUNG
    if behaviour == "deaf" and last or behaviour == "once":
        raise RuntimeError(f"rank {rank} breaks")
    end = time.monotonic() + 60
    while time.monotonic() < end and not (received and behaviour == "obey"):
        time.sleep(0.05)
    if rank == 0 and received:  # later than the others, which must not be taken for a crash
        time.sleep(3)
    print(f"rank {rank} leaves after {received}")
    return STOPPED if received else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
