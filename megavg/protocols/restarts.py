"""Overwriting under a scheduler that starts a job again with the same words: only the first start may overwrite.

``MEGAVG_JOB`` names the job (slurm/job.sh sets it). What replaces a folder's content for a job leaves its name there;
a later start of that job finds it, and goes on with what the earlier one has made.
"""

from __future__ import annotations

import os
from pathlib import Path

_MARK = ".made-by-job"


def is_of_this_job(folder: str | os.PathLike) -> bool:
    """Whether an earlier start of this very job has made, or replaced, what is in ``folder``; never outside of jobs."""
    job = os.environ.get("MEGAVG_JOB")
    try:
        return bool(job) and Path(folder, _MARK).read_text() == job
    except OSError:
        return False


def note_job(folder: str | os.PathLike) -> None:
    """Say in ``folder``, which exists, that this job has made what is in it; nothing is written outside of jobs."""
    job = os.environ.get("MEGAVG_JOB")
    if job:
        partial = Path(folder, f"{_MARK}.tmp")
        partial.write_text(job)
        os.replace(partial, Path(folder, _MARK))
