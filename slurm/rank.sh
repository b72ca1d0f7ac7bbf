#!/usr/bin/env bash
# Run a command as one rank: srun starts `slurm/rank.sh COMMAND ...` once for each task.
#
# It tells torch.distributed who the rank is, and job.sh how it ended: RANK_NOTES is a folder that all nodes see.
set -uo pipefail

main() {  # a function, so that the shell has read all of it before a signal comes
    local status copied copier note="$RANK_NOTES/ended-$SLURM_PROCID"
    export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"

    # Slurm signals every process of a step. The command knows what to do; this shell only has to outlive it.
    trap : USR1 TERM
    exec {copied}> >(trap '' USR1 TERM; exec tee -a "$RANK_NOTES/stderr-$RANK" >&2)
    copier=$!
    { "$@" 2>&"$copied" {copied}>&-; status=$?; } 2> /dev/null  # job.sh tells of a kill, not this shell
    trap '' USR1 TERM
    exec {copied}>&-
    [ "$status" != 0 ] || exit 0

    for _ in {1..10}; do  # its last words are on their way; a child that it left behind may hold the pipe for ever
        kill -0 "$copier" 2> /dev/null || break
        sleep 0.1
    done
    printf '%s %d %d %s\n' "$(date +%s.%N)" "$status" "$RANK" "${SLURMD_NODENAME:-$(hostname)}" > "$note.tmp"
    mv "$note.tmp" "$note"
    # A rank that has saved must not count as a bad exit: srun would end the others while they leave.
    [ "$status" != 75 ] || exit 0
    # The others may wait in a collective for ever, and srun alone would give them KillWait, half a minute by default.
    # Those that see an error of their own have this time to tell it.
    sleep 2
    { scancel --quiet --signal=KILL "$SLURM_JOB_ID.$SLURM_STEP_ID"; } 2> /dev/null
    exit "$status"
}

main "$@"
