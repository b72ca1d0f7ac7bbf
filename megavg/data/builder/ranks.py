"""Which of several MPI ranks this process is, and the little that ranks tell each other while they build shards."""

from __future__ import annotations

import os
from typing import Any

# What launchers set for each process: Open MPI's mpirun; MPICH, Intel MPI and srun --mpi=pmi2; srun.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


class RanksError(ValueError):
    """Something that went wrong on one rank and was told to all: every rank raises it, one has to print it."""


class Ranks:
    """One process alone. ``MpiRanks`` has the same methods; each of them must be called on every rank."""

    rank = 0
    size = 1

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all ranks in their order, on rank 0; None elsewhere."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return value

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank when one of them has an error; alone, that error itself."""
        if error is not None:
            raise error

    def abort(self) -> None:
        """End all ranks now, as one of them cannot go on."""


class MpiRanks(Ranks):
    """The ranks of ``MPI.COMM_WORLD``."""

    def __init__(self, comm: Any):
        self._comm = comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()

    def gather(self, value: Any) -> list[Any] | None:
        """As ``Ranks.gather``."""
        return self._comm.gather(value, root=0)

    def broadcast(self, value: Any) -> Any:
        """As ``Ranks.broadcast``."""
        return self._comm.bcast(value, root=0)

    def agree(self, error: Exception | None) -> None:
        """As ``Ranks.agree``; the error of the lowest rank that has one."""
        errors = self._comm.allgather(None if error is None else str(error))
        told = next((text for text in errors if text is not None), None)
        if told is not None:
            raise RanksError(told) from error

    def abort(self) -> None:
        """As ``Ranks.abort``."""
        self._comm.Abort(1)


def join_ranks() -> Ranks:
    """The ranks this process was started with; mpi4py is imported only if a launcher started several.

    Relied on: ``OMPI_COMM_WORLD_SIZE`` (Open MPI), ``PMI_SIZE`` (MPICH, Intel MPI, ``srun --mpi=pmi2``) or
    ``SLURM_STEP_NUM_TASKS`` (``srun``) greater than 1.

    Raises:
        ValueError: mpi4py is missing, or it does not see as many ranks as were started.
    """
    name, size = next(((name, int(os.environ[name])) for name in _SIZE_VARIABLES
                       if os.environ.get(name, "").isdecimal() and int(os.environ[name]) > 1), ("", 1))
    if size == 1:
        return Ranks()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"{name}={size} says that this is one of {size} processes, but mpi4py cannot be imported "
                         f"({error}); install mpi4py and an MPI library, or start one process with "
                         "--processes") from error
    ranks = MpiRanks(MPI.COMM_WORLD)
    if ranks.size != size:
        raise ValueError(f"{name}={size}, but mpi4py sees {ranks.size} rank(s): it was built for another MPI than the "
                         "launcher's. Start with the mpirun of that MPI, or srun --mpi=pmix (or pmi2), or start one "
                         "process with --processes")
    return ranks
