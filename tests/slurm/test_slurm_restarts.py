"""What job.sh and rank.sh do when ranks are asked to leave, crash or hang, in a real Slurm, with ranks without a model.
"""

from __future__ import annotations

import re
import sys
import time

import pytest

from tests.slurm.cluster import ROOT

pytestmark = pytest.mark.slow

TOY = "tests/slurm/toy.sbatch"
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")


def all_up(cluster, job: str, ranks: int, start: int = 1) -> None:
    cluster.wait(job, "up", lambda: cluster.log(job).count("is up:") == ranks * start, 60)


def test_every_rank_knows_who_it_is(cluster, tmp_path):
    state, status, log = cluster.finish(cluster.submit(tmp_path, *TWO_BY_TWO, TOY, "done"))
    assert (state, status) == ("COMPLETED", 0), log
    ranks = sorted(re.findall(r"rank (\d) is up: WORLD_SIZE=(\d) LOCAL_RANK=(\d) SLURMD_NODENAME=(\w+) "
                              r"MASTER_ADDR=127.0.0.1 CUDA_VISIBLE_DEVICES=(\S+)", log))
    assert ranks == [("0", "4", "0", "n1", "0,1"), ("1", "4", "1", "n1", "0,1"),
                     ("2", "4", "0", "n2", "0,1"), ("3", "4", "1", "n2", "0,1")]
    assert re.search(r"job \d+ on n\[1-2\], 4 ranks, rank 0 at 127.0.0.1:2\d{4}, start 1, ", log)
    assert not list(tmp_path.glob(".ranks-*"))


def test_a_dry_run_as_a_job_shows_nodes_and_address(cluster, tmp_path):
    state, status, log = cluster.finish(cluster.submit(
        tmp_path, *TWO_BY_TWO, "--cpus-per-task=1", "slurm/train.sbatch", "--dry-run", ROOT / "examples/demo.yaml"))
    assert (state, status) == ("COMPLETED", 0) and "4 tasks on n[1-2]" in log and "met at 127.0.0.1:2" in log, log
    assert log.splitlines()[-1].startswith("srun --kill-on-bad-exit=1 ")


def test_pre_emption_and_arrays(cluster, tmp_path):
    """Both tasks of an array are pre-empted, one after the other in the queue again, and one alone is cancelled."""
    array = cluster.submit(tmp_path, "--array=3-4", "--nodes=2", "--ntasks-per-node=1", TOY, "obey")
    tasks = [f"{array}_3", f"{array}_4"]
    for task in tasks:
        all_up(cluster, task, 2)
    urgent = cluster.submit(tmp_path, "--partition=high", "--nodes=2", "--exclusive", "--wrap=true")
    assert cluster.finish(urgent, 60)[0] == "COMPLETED"
    for task in tasks:
        cluster.start_again(task, 1)
    for task in tasks:
        all_up(cluster, task, 2, start=2)
        log = cluster.log(task)
        assert all(f"rank {rank} leaves after ['SIGTERM']" in log for rank in (0, 1)), log
        assert "asked to leave; back into the queue for restart 1 of 20" in log
        assert log.count("start 2, ") == 1
    cluster.ask("scancel", tasks[0])
    state, _, log = cluster.finish(tasks[0], 60)
    assert state == "CANCELLED" and "so it is not started again from here" in log
    time.sleep(0.5)
    assert cluster.about(tasks[0])["JobState"] == "CANCELLED", "what a user cancels stays cancelled"
    assert cluster.about(tasks[1])["JobState"] == "RUNNING", "the other task of the array is left alone"
    cluster.ask("scancel", tasks[1])
    cluster.finish(tasks[1], 60)


def test_a_signal_during_start_up_loses_nothing_and_restarts_have_an_end(cluster, tmp_path):
    job = cluster.submit(tmp_path, *TWO_BY_TWO, TOY, "early", MAX_RESTARTS="1")
    all_up(cluster, job, 4)
    cluster.ask("scancel", "--signal=USR1", job)
    cluster.start_again(job, 1)
    all_up(cluster, job, 4, start=2)
    cluster.ask("scancel", "--signal=USR1", job)
    state, status, log = cluster.finish(job, 60)
    assert (state, status) == ("FAILED", 75)
    assert log.splitlines()[-1] == ("[slurm] asked to leave after 1 restarts, and MAX_RESTARTS=1; submit the same "
                                    "command to go on")


def test_a_crash_ends_ranks_that_hang_and_has_the_last_word(cluster, tmp_path):
    job = cluster.submit(tmp_path, *TWO_BY_TWO, TOY, "deaf")
    all_up(cluster, job, 4)
    started = time.monotonic()
    state, status, log = cluster.finish(job, 60)
    assert (state, status) == ("FAILED", 1) and time.monotonic() - started < 15
    assert log.splitlines()[-2:] == ["RuntimeError: rank 3 breaks",
                                     "[slurm] rank 3 on n2 failed first, with status 1"]


def test_a_mistake_of_the_user_is_told_and_not_tried_again(cluster, tmp_path):
    state, status, log = cluster.finish(cluster.submit(tmp_path, *TWO_BY_TWO, TOY, "wrong", RESTART_AFTER_CRASH="1"))
    assert (state, status) == ("FAILED", 2), log
    assert log.splitlines()[-3:-1] == ["[slurm] last lines of rank 0:", "error: this is what to mend"]


def test_a_crash_starts_again_where_that_is_asked_for(cluster, tmp_path):
    job = cluster.submit(tmp_path, "--nodes=2", "--ntasks-per-node=1", TOY, "once", RESTART_AFTER_CRASH="1")
    cluster.start_again(job, 1)
    state, status, log = cluster.finish(job, 60)
    assert (state, status) == ("COMPLETED", 0)
    assert "crashed with status 1; back into the queue for restart 1 of 20" in log and "[slurm] finished, " in log


def test_a_hang_starts_again_by_itself(cluster, tmp_path):
    job = cluster.submit(tmp_path, "--nodes=2", "--ntasks-per-node=1", TOY, "hung")
    cluster.start_again(job, 1)
    state, status, log = cluster.finish(job, 60)
    assert (state, status) == ("COMPLETED", 0)
    assert "first, with status 76\n[slurm] hung; back into the queue for restart 1 of 20" in log
    assert not list(tmp_path.glob(".futile-*"))


def test_a_job_that_may_not_be_requeued_says_what_to_do(cluster, tmp_path):
    state, status, log = cluster.finish(cluster.submit(
        tmp_path, "--nodes=1", "--ntasks-per-node=1", "--no-requeue", TOY, "hung"), 60)
    assert (state, status) == ("FAILED", 76)
    assert re.fullmatch(r"\[slurm\] it cannot be put back \(.*\); submit the same command to go on, with sbatch "
                        r"--requeue", log.splitlines()[-1]), log
    assert not list(tmp_path.glob(".futile-*"))


@pytest.mark.parametrize("export", ["NONE", f"MEGAVG_VENV={sys.prefix}"])
def test_ranks_have_what_the_job_sets_whatever_the_shell_exports(cluster, tmp_path, export):
    state, status, log = cluster.finish(cluster.submit(
        tmp_path, "--nodes=2", "--ntasks-per-node=1", f"--export={export}", TOY, "done"), 60)
    assert (state, status) == ("COMPLETED", 0) and log.count("MASTER_ADDR=127.0.0.1") == 2, log


def test_hangs_that_get_the_run_no_further_have_an_end(cluster, tmp_path):
    job = cluster.submit(tmp_path, "--nodes=1", "--ntasks-per-node=1", TOY, "stuck", MAX_FUTILE_STARTS="1")
    cluster.start_again(job, 1)  # the first start has kept something
    state, status, log = cluster.finish(job, 60)
    assert (state, status) == ("FAILED", 76) and cluster.about(job)["Restarts"] == "1", log
    assert log.splitlines()[-1] == ("[slurm] hung, 1 times in a row without anything new under kept*, so it is not "
                                    "started again (MAX_FUTILE_STARTS=1); submit the same command to try once more")
    assert not list(tmp_path.glob(".futile-*"))
