"""A real Slurm of two nodes on this machine, started by this folder's own scripts, for as long as the tests last."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

HERE = Path(__file__).parent
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")

# for a session that is killed: ends the Slurm in its place
_END = 'while kill -0 "$1" 2> /dev/null; do sleep 1; done; "$2" "$3"; rm -rf "$3"'


def _free_ports(count: int) -> int:
    """The first of ``count`` ports in a row that nobody listens on."""
    for first in range(10000 + os.getpid() % 500 * 16, 20000, 16):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for number, one in enumerate(sockets):
                one.bind(("", first + number))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise OSError("no free ports")


@pytest.fixture(scope="session")
def cluster():
    """Nodes n1 and n2 with 4 CPUs and 2 GPUs each, none of them real; skips where Slurm is not installed."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    unable = pytest.fail if "slurm" in os.environ.get("MEGAVG_EXPECTED_TESTS", "") else pytest.skip
    if missing:
        unable(f"no {', '.join(missing)}: install the distribution's packages slurm-wlm, munge and libpmix-dev")
    if os.geteuid() != 0:
        unable("only root can start a Slurm whose jobs run as other users")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not pytest's: the path of a socket is at most 107 characters
    ending = subprocess.Popen(["bash", "-c", _END, "end", str(os.getpid()), HERE / "stop_slurm.sh", folder],
                              start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        done = subprocess.run([HERE / "start_slurm.sh", folder, "2", "4", "2", str(_free_ports(3))],
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "MEGAVG_VENV": sys.prefix}
        for name in ("MEGAVG_HOME", "RANK", "WORLD_SIZE", "MASTER_ADDR"):
            environment.pop(name, None)
        yield Cluster(environment)
    finally:
        ending.kill()
        ending.wait()
        subprocess.run([HERE / "stop_slurm.sh", folder], timeout=120)
        shutil.rmtree(folder, ignore_errors=True)
