"""Which process am I: what each launcher says of it, and where all of them meet."""

from __future__ import annotations

# What mpirun (Open MPI), mpirun and srun (PMI) and srun say of a process: rank, world size, rank on its machine. Of
# srun's, SLURM_NTASKS will not do: a batch script has it too, with SLURM_PROCID=0, and what it starts itself is alone.
_LAUNCHERS = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
              ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
_MPI = 2  # the first so many of them are MPI's, which can be asked where to meet


def read_launcher(environment: dict[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torch.distributed reads them, from any launcher.

    A process that no launcher started is alone. Several processes need an address to meet at, which mpirun's agree on.
    """
    names, by_mpi = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), False
    found = {name: environment[name] for name in names if name in environment}
    for number, launcher in enumerate(_LAUNCHERS):
        if "RANK" not in found and all(name in environment for name in launcher):
            found, by_mpi = dict(zip(names, (environment[name] for name in launcher))), number < _MPI
    if "RANK" in found and "WORLD_SIZE" not in found or "WORLD_SIZE" in found and "RANK" not in found:
        raise ValueError(f"the environment sets only {', '.join(found)}; set both RANK and WORLD_SIZE, or neither")
    _check_sizes(found, environment)
    alone = int(found.setdefault("WORLD_SIZE", "1")) == 1
    found.setdefault("RANK", "0")
    found.setdefault("LOCAL_RANK", found["RANK"] if alone else "0")
    if by_mpi and not alone and "MASTER_ADDR" not in environment:
        found["MASTER_ADDR"], found["MASTER_PORT"] = meeting_place(int(found["WORLD_SIZE"]))
        return found
    found["MASTER_ADDR"] = environment.get("MASTER_ADDR", "127.0.0.1" if alone else "")
    found["MASTER_PORT"] = environment.get("MASTER_PORT", "0" if alone else "29500")
    if not found["MASTER_ADDR"]:
        raise ValueError(f"{found['WORLD_SIZE']} processes were started without an address to meet at; set MASTER_ADDR "
                         "to the host of rank 0, or start them with the deepspeed launcher")
    return found


def _check_sizes(found: dict[str, str], environment: dict[str, str]) -> None:
    """Refuse RANK and WORLD_SIZE that a shell has left, where mpirun or srun starts more processes than they tell of.

    All of these would take themselves for the same one, and write over each other's files. A launcher inside of one of
    them (deepspeed, torchrun) makes a world of its own, and leaves its marks.
    """
    if any(name in environment for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "TORCHELASTIC_RUN_ID")):
        return
    for names in _LAUNCHERS:
        rank, size = environment.get(names[0], "0"), environment.get(names[1], "1")
        if int(rank) >= int(found.get("WORLD_SIZE", size)):
            raise ValueError(f"WORLD_SIZE={found['WORLD_SIZE']} in the environment, but {names[1]}={size} processes "
                             "were started; unset RANK, WORLD_SIZE and LOCAL_RANK")


def meeting_place(world_size: int) -> tuple[str, str]:
    """(address, port) of the first of mpirun's processes, which all of them agree on through MPI.

    Raises:
        ValueError: mpi4py is missing, or was built for another MPI than the one that started the processes.
    """
    import socket

    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"mpirun started {world_size} processes without MASTER_ADDR, and mpi4py, which could agree on "
                         f"one, cannot be imported ({error}); pass -x MASTER_ADDR=HOST_OF_RANK_0 to mpirun") from error
    world = MPI.COMM_WORLD
    if world.size != world_size:
        raise ValueError(f"mpirun started {world_size} processes, but mpi4py sees {world.size}: it was built for "
                         "another MPI; install mpi4py anew, or pass -x MASTER_ADDR=HOST_OF_RANK_0 to mpirun")
    on_this_machine = world.Split_type(MPI.COMM_TYPE_SHARED)
    port = None
    if world.rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
    host = "127.0.0.1" if on_this_machine.size == world.size else socket.gethostname()
    return tuple(map(str, world.bcast((host, port))))
