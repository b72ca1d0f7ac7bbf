#!/usr/bin/env bash
# End what start_slurm.sh began, and all of its jobs: stop_slurm.sh FOLDER
folder=$(realpath -m "$1")
export SLURM_CONF="$folder/slurm.conf"
jobs=$(squeue -h -o %A 2> /dev/null)
[ -z "$jobs" ] || scancel --signal=KILL --full $jobs 2> /dev/null
[ -z "$jobs" ] || scancel $jobs 2> /dev/null
for _ in $(seq 40); do
    [ -n "$(squeue -h 2> /dev/null)" ] || break
    sleep 0.25
done
pids=$(cat "$folder"/run/*.pid 2> /dev/null)
# shellcheck disable=SC2086
[ -z "$pids" ] || kill $pids 2> /dev/null
for _ in $(seq 40); do
    kill -0 $pids 2> /dev/null || exit 0
    sleep 0.25
done
kill -KILL $pids 2> /dev/null
true
