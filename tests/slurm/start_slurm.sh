#!/usr/bin/env bash
# Start a Slurm of several nodes on this one machine, as root, without systemd:
#   start_slurm.sh FOLDER NODES CPUS GPUS PORT
# CPUS of each node are believed, however few there are; GPUS of each node (0 to 2) are files that stand for them. Ports
# PORT (10000 to 19999) to PORT + NODES are taken. Everything lies in FOLDER, whose path must be short (sockets); then
# `export SLURM_CONF=FOLDER/slurm.conf`. stop_slurm.sh FOLDER ends it. Partition "high" pre-empts "low", the default.
set -euo pipefail
folder=$(realpath -m "$1") nodes=$2 cpus=$3 gpus=$4 port=$5 host=$(hostname -s)
memory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 / nodes))
mkdir -p "$folder"/{state,log,run}
chmod 755 "$folder"

head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 400 "$folder/munge.key"
munged --force --key-file="$folder/munge.key" --socket="$folder/run/munge.sock" --pid-file="$folder/run/munged.pid" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/state/munge.seed"

cat > "$folder/slurm.conf" << CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
# job.sh derives a port from a job's number, and another such Slurm may run on this machine
FirstJobId=$((port - 9999))
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.sock
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/state/spool.%n
# the nodes share one file system, on which PMIx would make the same folder twice
TmpFS=$folder/tmp.%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
KillWait=30
JobRequeue=1
MinJobAge=3600
GresTypes=gpu
NodeName=DEFAULT CPUs=$cpus Sockets=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=$((memory - 200)) State=UNKNOWN
CONF
[ "$gpus" = 0 ] || sed -i "s/^NodeName=DEFAULT/& Gres=gpu:$gpus/" "$folder/slurm.conf"
printf 'Name=gpu File=%s\n' $(printf '/dev/null\n/dev/zero\n' | head -n "$gpus") > "$folder/gres.conf"
for i in $(seq "$nodes"); do
    echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i))"
done >> "$folder/slurm.conf"
cat >> "$folder/slurm.conf" << CONF
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF

export SLURM_CONF="$folder/slurm.conf"
slurmctld
for i in $(seq "$nodes"); do
    mkdir -p "$folder/state/spool.n$i" "$folder/tmp.n$i"
    slurmd -N "n$i"
done
for _ in $(seq 120); do
    [ "$(sinfo -h -p low -t idle -o %D 2> /dev/null)" != "$nodes" ] || exit 0
    sleep 0.25
done
echo "error: the nodes did not come up" >&2
sinfo -N -l >&2 || true
tail -n 20 "$folder"/log/*.log >&2
exit 1
