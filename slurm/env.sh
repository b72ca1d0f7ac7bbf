# What every job of megavg starts with. Edit this file for your cluster, or export any of these variables before sbatch:
# a value that is set already is kept.

# environment modules to load, such as "gcc/13.2 cuda/12.6"
: "${MEGAVG_MODULES:=}"
# the Python environment; `make setup` makes this one. It must be on a file system that all nodes share.
: "${MEGAVG_VENV:=$MEGAVG_HOME/.venv}"
# the PMI that srun offers to MPI programs (srun --mpi=list); only slurm/make_shards.sbatch uses MPI
: "${MEGAVG_MPI:=pmix}"
# how often one job may start again, after its time limit, a pre-emption or a crash
: "${MAX_RESTARTS:=20}"
# ... and after how many hangs or crashes in a row, in which the run kept no new checkpoint or answer, it does not
: "${MAX_FUTILE_STARTS:=3}"
# 1 starts a crashed run again too, from its last checkpoint; a wrong option or wrong data never
: "${RESTART_AFTER_CRASH:=0}"

if [ -n "$MEGAVG_MODULES" ]; then
    set +u  # the modules' own scripts read variables that are not set
    [ -n "$(type -t module)" ] || . /etc/profile.d/modules.sh
    # shellcheck disable=SC2086
    module load $MEGAVG_MODULES || exit 2
    set -u
fi
[ ! -d "$MEGAVG_VENV/bin" ] || export PATH="$MEGAVG_VENV/bin:$PATH"

# what is exported here reaches the ranks, also where the job was submitted with sbatch --export=NONE or =NAME
export SLURM_EXPORT_ENV=ALL

export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# what DeepSpeed compiles at its first use
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$MEGAVG_VENV/torch_extensions}"
# from 22.05 on srun no longer takes this from sbatch
export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}"

# Network. The first two are for nodes with several interfaces; the others show or change what NCCL does.
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=INFO
# export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# export TORCH_NCCL_TRACE_BUFFER_SIZE=2000
# export HF_HUB_OFFLINE=1
