"""Which process am I: every launcher's way of saying it, and what is refused."""

from __future__ import annotations

import pytest

from megavg.parallel.launcher import read_launcher
from megavg.parallel.mcore import check_world_size


def ranks(environment: dict[str, str]) -> tuple[str, str, str]:
    found = read_launcher(environment)
    return found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]


def test_alone_without_a_launcher():
    found = read_launcher({})
    assert ranks({}) == ("0", "1", "0")
    assert found["MASTER_PORT"] == "0"  # any free port, so that two lone runs do not meet


@pytest.mark.parametrize("environment", [
    {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"},
    {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
    {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"},
    {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"},
])
def test_each_launcher_is_understood(environment):
    assert ranks({**environment, "MASTER_ADDR": "127.0.0.1"}) == ("3", "4", "1")


def test_torch_names_win_over_the_scheduler():
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1",
                   "SLURM_LOCALID": "0", "MASTER_ADDR": "127.0.0.1"}
    assert ranks(environment) == ("1", "2", "1")


@pytest.mark.parametrize("environment, message", [
    ({"RANK": "1"}, "RANK and WORLD_SIZE"),
    ({"WORLD_SIZE": "2"}, "RANK and WORLD_SIZE"),
    ({"RANK": "0", "WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
     "OMPI_COMM_WORLD_SIZE=2 processes were started; unset RANK"),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}, "MASTER_ADDR"),
])
def test_half_an_environment_is_refused(environment, message):
    """Otherwise every process would believe to be alone and write over the others' files."""
    with pytest.raises(ValueError, match=message):
        read_launcher(environment)


def test_a_command_in_a_batch_script_is_alone():
    """Slurm tells the script of all tasks of the job, but only srun starts them."""
    assert ranks({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}) == ("0", "1", "0")


def test_a_launcher_inside_of_a_task_makes_a_world_of_its_own():
    task = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "5"}
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    assert ranks({**task, **alone, "LOCAL_WORLD_SIZE": "1"}) == ("0", "1", "0")
    # a shell of srun --pty, from which a launcher starts two
    assert ranks({**task, "SLURM_PROCID": "0", **alone, "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"})[0] == "1"


def test_a_world_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="world size 6 is not divisible .* 4 \\* 1"):
        check_world_size(6, 4, 1)
