# @name@: @nodes@ nodes x @gpus@ ranks, from the code and the preset in @run@.
run=@run@
# The job id of an array's last task is that of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
start=${SLURM_RESTART_COUNT:-0}
told=
timer=
status=
trap leave USR1
trap told=yes TERM  # the ranks get it too; this shell stays to record how they ended

say() {
  printf '%s  job %s start %s: %s\n' "$(date '+%F %T')" "$job" "$start" "$*" |
    tee -a "$run/launch/events.txt"
}

# An entry of the state that the trainer records, or nothing.
state() {
  sed -n "s/^ \"$1\": \"\(.*\)\",*$/\1/p" "$run/launch/state.json" 2> /dev/null
}

newest() {
  newest=$(state checkpoint)
  echo "${newest:-none}"
}

# The controller may be busy or restarting: retry for five minutes.
insist() {
  for pause in 5 10 15 30 60 60 60 60; do
    "$@" && return
    sleep $pause
  done
  "$@"
}

# A cancelled job stays cancelled, and a script whose node Slurm gave up must not requeue the next
# start. A second failure without a new checkpoint in between ends the job. A start that was told to
# leave has not failed, whatever its status.
again() {
  case $(insist scontrol show job -o "$job") in
    *" JobState=RUNNING "*" Restarts=$start "*)
      if [ "$status" != @more@ ] && [ -z "$told" ]; then
        if [ "$(cat "$run/launch/failed-at" 2> /dev/null)" = "$(newest)" ]; then
          say "$1, for the second time at checkpoint $(newest): not started again"
          return
        fi
        newest > "$run/launch/failed-at"
      fi
      say "$1; resumes from checkpoint $(newest)"
      insist scontrol requeue "$job" || say "scontrol does not answer: start the run again" ;;
    "") say "$1; scontrol does not answer: start the run again" ;;
    *) say "$1; cancelled, or already started again" ;;
  esac
}

# The signal is repeated, since a rank that is starting ignores it. The job must requeue itself before
# its time limit: after it Slurm would end the job for good.
leave() {
  told=yes
  [ -z "$timer" ] || return
  {
    for _ in 1 2 3 4 5 6 7 8 9; do
      scancel --signal=USR1 "$job" &
      sleep @tenth@
    done
    again "did not leave in @seconds@ s"
  } &
  timer=$!
}

# Run a command in the background, where a trap of this shell need not wait for it, and return its
# status. The status goes through a file of this start's own: bash loses it, and may wait for the
# timer of `leave` instead, when that trap comes while it waits.
attend() {
  file=$run/launch/ended-$job-$start
  rm -f "$file"
  {
    trap : TERM USR1  # the command itself acts on them
    "$@"
    echo $? > "$file"
  } &
  ranks=$!
  wait "$ranks"
  while kill -0 "$ranks" 2> /dev/null; do sleep 0.2; done  # a signal ended the wait
  ended=$(cat "$file")
  rm -f "$file"
  return "${ended:-137}"
}

@preamble@

say "begins on $SLURM_JOB_NODELIST at checkpoint $(newest)"
@check@if [ -n "$told" ]; then
  [ -z "$timer" ] || kill "$timer"
  again "told to leave before the ranks were started"
  exit @more@
fi
attend @srun@
status=$?
[ -z "$timer" ] || kill "$timer" 2> /dev/null

case $status in
  0)  # also what srun says when Slurm has given the job's node up
    if [ "$(state state)" = finished ]; then
      say "finished"
    elif [ -e "$run/launch/stop" ]; then
      say "stopped as requested"
    else
      again "srun ended in mid-run"
    fi ;;
  @refused@) say "refused for the reason above; not started again" ;;
  @more@)
    if [ -e "$run/launch/stop" ]; then
      say "stopped as requested"
    elif [ "$(state why)" = "by a signal before the first step" ]; then
      again "told to leave before the first step"
    else
      again saved
    fi ;;
  *)
    if [ -n "$told" ]; then
      again "told to leave, ended with status $status"
    else
      again "failed with status $status"
    fi ;;
esac
exit $status
