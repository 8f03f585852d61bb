# What every job of slurm/submit.py does around its command. The rendered script sources the snapshot's copy.
# Needs: SLURM's own variables, `srun_args` (an array), `vtok_folder`, `vtok_lead` (seconds), `most_restarts`.

# Where the ranks meet, and what each process may use. What the user has set stays as it is.
vtok_prepare() {
  local first address
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # the address, not the name: names of nodes need not resolve everywhere
  address=$(scontrol show node "$first" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  export MASTER_ADDR=${address:-$first}
  export MASTER_PORT=$((10000 + SLURM_JOB_ID % 10000)) # below the ports that systems give away
  case $MASTER_ADDR in
    127.*) export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo} ;;
  esac
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
  # since 22.05 srun does not take it over from sbatch by itself
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
  export PYTHONUNBUFFERED=1
  job=$SLURM_JOB_ID # of an array, not the element's own id: that of the last one names the whole array
  [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  restarts=${SLURM_RESTART_COUNT:-0}
  echo "vtok: job $job, start $((restarts + 1)), on $SLURM_JOB_NODELIST, meeting at $MASTER_ADDR:$MASTER_PORT, $(date +%FT%T%z)"
}

# COMMAND ...: runs it once a rank, asks SLURM for another turn if it was told to stop, and ends the script.
vtok_run() {
  local status=0
  # A training that was told to stop, and saved, leaves its status here; so does any rank that is told before there is
  # anything to save. The status of srun alone does not tell: when one rank ends so, or fails, srun ends the others by
  # SIGTERM.
  export VTOK_STOPPED=$vtok_folder/.stopped-$job
  rm -f "$VTOK_STOPPED"
  trap : USR1 # should somebody signal the script as well, it goes on to the lines below
  srun --kill-on-bad-exit=1 "${srun_args[@]}" "$@" || status=$?
  if [ -s "$VTOK_STOPPED" ]; then
    status=$(cat "$VTOK_STOPPED")
    rm -f "$VTOK_STOPPED"
    vtok_requeue "$status"
  elif [ "$status" = 138 ] || { [ "$status" = 143 ] && vtok_is_leaving; }; then
    vtok_requeue "$status" # a command that SIGUSR1 or SIGTERM ends as it stands, or a training that could not save yet
  fi
  echo "vtok: job $job ended with status $status, $(date +%FT%T%z)"
  exit "$status"
}

# Whether SLURM is taking the nodes back: preemption, or the time limit.
vtok_is_leaving() {
  local about ends
  about=$(scontrol show job "$job" --oneliner) || return 1
  case $about in *" PreemptTime="[0-9]*) return 0 ;; esac
  ends=$(date -d "$(sed -n 's/.* EndTime=\([^ ]*\).*/\1/p' <<<"$about")" +%s 2>/dev/null) || return 1
  [ $((ends - $(date +%s))) -lt $((vtok_lead + 60)) ]
}

vtok_requeue() {
  local state attempt
  state=$(squeue --noheader --jobs="$job" --format=%T 2>/dev/null || true)
  if [ "$state" != RUNNING ]; then
    echo "vtok: not requeued: SLURM says ${state:-that it is gone} (scancel, or the time limit itself)"
    return
  fi
  if [ "$restarts" -ge "$most_restarts" ]; then
    echo "vtok: NOT requeued: restarted $restarts times, and --max-restarts is $most_restarts"
    return
  fi
  echo "vtok: job $job asks to be queued again after status $1, $(date +%FT%T%z)"
  for attempt in 1 2 3 4 5; do
    # deaf to the signal that ended the command, should it come again
    if (trap '' USR1 && exec scontrol requeue "$job"); then
      sleep 60 # SLURM ends this script
      exit "$1"
    fi
    sleep "$attempt"
  done
  echo "vtok: NOT requeued: scontrol refused five times; submit again, and the run goes on from its last checkpoint"
}
