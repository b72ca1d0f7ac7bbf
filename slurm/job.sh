# What the job scripts share; they source this file with MEGAVG_HOME set to the repository.

. "$MEGAVG_HOME/slurm/env.sh"

STOPPED=75  # exit status of a run that was asked to leave and has saved (megavg/trainer/stop_signal.py)
HUNG=76  # exit status of a run whose watchdog has found a hang (megavg/parallel/watchdog.py)
MENDABLE=2  # exit status of an error that its message tells how to mend
LEFT=" $STOPPED $((128 + $(kill -l USR1))) $((128 + $(kill -l TERM))) "  # asked to leave; the latter two at start-up

# by this name a job knows at a later start what it has made before (megavg/protocols/restarts.py)
unset MEGAVG_JOB
[ -z "${SLURM_JOB_ID:-}" ] || export MEGAVG_JOB="${SLURM_CLUSTER_NAME:-slurm}-$SLURM_JOB_ID"

say() { printf '[slurm] %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit "$MENDABLE"; }
quoted() { printf '%q ' "$@"; }

usage() {  # SCRIPT: print its comment
    sed -n '/^# /,/^[^#]/s/^# \{0,1\}//p' "$1"
}

need() {  # SCRIPT COUNT ARGUMENTS...: print how it is used where arguments are missing
    [ "$(($# - 2))" -ge "$2" ] || { usage "$1"; exit "$MENDABLE"; }
}

dry_run() {  # SCRIPT COMMAND...: say what would run, and end
    local script=$1
    shift
    say "dry run: nothing is started"
    say "resources, where sbatch is not told others: $(sed -n 's/^#SBATCH //p' "$script" | tr '\n' ' ')"
    [ -z "${SLURM_JOB_ID:-}" ] || say "job $SLURM_JOB_ID: ${SLURM_NTASKS:-1} tasks on $SLURM_JOB_NODELIST"
    [ -z "${MASTER_ADDR:-}" ] || say "rank 0 is met at $MASTER_ADDR:$MASTER_PORT"
    say "python is $(command -v python || echo missing: set MEGAVG_VENV)"
    printf '%s\n' "$(quoted "$@")"
    exit 0
}

check_config() {  # MODULE SECTION CONFIG ARGUMENTS...: print SECTION.output_dir, or say what is wrong, before a start
    command -v python > /dev/null || fail "there is no python; make setup makes $MEGAVG_VENV, or set MEGAVG_VENV or" \
        "MEGAVG_MODULES (slurm/env.sh)"
    python - "$MEGAVG_HOME" "$1" "$2" --config "${@:3}" << 'EOF'
import importlib
import sys

sys.path[0], module, section = sys.argv[1:4]
try:
    config = importlib.import_module(module).parse_command_line(sys.argv[4:])
except ValueError as error:
    sys.exit(f"error: {error}")
print(getattr(config, section).output_dir)
EOF
}

in_a_job() {
    [ -n "${SLURM_JOB_ID:-}" ] || fail "this is no Slurm job; submit it with sbatch, or add --dry-run"
}

find_master() {  # MASTER_ADDR and MASTER_PORT: the first node of the allocation, where rank 0 runs
    unset MASTER_ADDR MASTER_PORT  # sbatch brings the whole environment of the shell that submits
    [ -n "${SLURM_JOB_NODELIST:-}" ] || return 0
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # a node's name need not be a host's
    getent hosts "$MASTER_ADDR" > /dev/null ||
        MASTER_ADDR=$(scontrol show node "$MASTER_ADDR" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))  # below the ports that connections take
}

# one bad exit ends the step, and so does a rank that does not leave after the others
SRUN=(srun --kill-on-bad-exit=1 --wait=120)

run_ranks() {  # KEPT COMMAND...: run it as every rank; start again what was asked to leave, or exit with how it ended
    # KEPT is a pattern of the files that show how far the run has come: checkpoints, or answers
    local kept=$1 before status first when rank node
    shift
    in_a_job
    export RANK_NOTES="$PWD/.ranks-$SLURM_JOB_ID"
    rm -rf "$RANK_NOTES"
    mkdir "$RANK_NOTES" || fail "cannot write to $PWD; submit from a folder that all nodes share"
    say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, $SLURM_NTASKS ranks, rank 0 at $MASTER_ADDR:$MASTER_PORT," \
        "start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date '+%F %T')"
    before=$(listing "$kept")
    trap : USR1 TERM  # the ranks have it too; this shell waits for them
    "${SRUN[@]}" "$MEGAVG_HOME/slurm/rank.sh" "$@"
    status=$?
    touch "$RANK_NOTES/over"  # a change of its own makes a network file system show the other nodes' files
    first=$(cat "$RANK_NOTES"/ended-* 2>/dev/null | sort -n | head -n 1)
    [ -z "$first" ] || read -r when status rank node <<< "$first"
    case "$LEFT" in *" $status "*) [ -z "$first" ] || { rm -rf "$RANK_NOTES"; start_again "asked to leave"; } ;; esac
    [ "$status" = 0 ] || tell_failure "$status" "${rank:-}" "${node:-}"
    rm -rf "$RANK_NOTES"
    [ "$status" != "$HUNG" ] || start_after_failure "$status" "hung" "$kept" "$before"
    if [ "$status" != 0 ] && [ "$status" != "$MENDABLE" ] && [ "$RESTART_AFTER_CRASH" = 1 ]; then
        start_after_failure "$status" "crashed with status $status" "$kept" "$before"
    fi
    rm -f "$(futile_starts)"
    [ "$status" != 0 ] || say "finished, $(date '+%F %T')"
    exit "$status"
}

escaped() { sed 's/[][*?\\]/\\&/g' <<< "$1"; }  # PATH: as a pattern that fits nothing else

listing() { compgen -G "$1" | xargs -r -d '\n' stat -c '%n %s' | cksum; }  # PATTERN: of the files that it fits

futile_starts() { printf '%s' "$PWD/.futile-$SLURM_JOB_ID"; }  # a file: how many in a row, and the listing after them

start_after_failure() {  # STATUS WHY KEPT BEFORE: start again, unless several starts in a row have kept nothing new
    local file count=0 then= now
    file=$(futile_starts) now=$(listing "$3")
    [ ! -f "$file" ] || { read -r count && read -r then; } < "$file"
    if [ "$now" != "$4" ]; then count=0; elif [ "$now" != "$then" ]; then count=1; else count=$((count + 1)); fi
    if [ "$count" -ge "$MAX_FUTILE_STARTS" ]; then
        rm -f "$file"
        say "$2, $count times in a row without anything new under $3, so it is not started again" \
            "(MAX_FUTILE_STARTS=$MAX_FUTILE_STARTS); submit the same command to try once more"
        exit "$1"
    fi
    printf '%s\n' "$count" "$now" > "$file.tmp" && mv "$file.tmp" "$file"
    start_again "$2" "$1"
}

tell_failure() {  # STATUS RANK NODE: the rank that failed first and its last words, below those of all the others
    local status=$1 rank=$2 node=$3 how="with status $1" words
    if [ -z "$rank" ]; then
        say "srun ended with status $status; no rank told why"
        return
    fi
    [ "$status" -le 128 ] || how="killed by SIG$(kill -l $((status - 128)))"
    [ "$status" != 137 ] || how+=", as a machine does that is out of memory"
    # of an error that all ranks see alike, only one prints the message
    words=$(cat "$RANK_NOTES"/ended-* | sort -n | while read -r _ _ other _; do
        [ -s "$RANK_NOTES/stderr-$other" ] && echo "$RANK_NOTES/stderr-$other" && break; done)
    {
        if [ -n "$words" ]; then
            say "last lines of rank ${words##*-}:"
            tail -n 20 "$words"
        fi
        say "rank $rank on $node failed first, $how"
    } >&2
}

start_again() {  # WHY [STATUS]: put this job into the queue again, or exit with the status, 75 if none is given
    # of an array's tasks, one has the array's own number, which would mean all of them
    local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} restarts=${SLURM_RESTART_COUNT:-0}
    local state refusal
    job=${job:-$SLURM_JOB_ID}
    state=$(scontrol show job -o "$job" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')
    if [ "$state" != RUNNING ]; then  # it was cancelled, or Slurm itself puts it back
        say "$1; the job is $state, so it is not started again from here"
    elif [ "$restarts" -ge "$MAX_RESTARTS" ]; then
        say "$1 after $restarts restarts, and MAX_RESTARTS=$MAX_RESTARTS; submit the same command to go on"
    else
        say "$1; back into the queue for restart $((restarts + 1)) of $MAX_RESTARTS, $(date '+%F %T')"
        if refusal=$(scontrol requeue "$job" 2>&1); then
            sleep 60  # Slurm ends this script
            exit "$STOPPED"
        fi
        say "it cannot be put back ($refusal); submit the same command to go on, with sbatch --requeue"
    fi
    rm -f "$(futile_starts)"
    exit "${2:-$STOPPED}"
}
