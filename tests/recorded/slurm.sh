#!/bin/bash
#SBATCH --job-name=imagenet64
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --partition=gpu
#SBATCH --account=diffusion
#SBATCH --signal=B:USR1@300
#SBATCH --output=/runs/imagenet64/launch/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --exclusive

# imagenet64: 64 nodes x 8 ranks, from the code and the preset in /runs/imagenet64.
adm_told=
adm_timer=
adm_requeued=
status=

# Once more after the setup, which may have variables, functions and traps of these names.
begin() {
  run=/runs/imagenet64
  # The job id of an array's last task is that of the whole array.
  job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  job=${job:-$SLURM_JOB_ID}
  start=${SLURM_RESTART_COUNT:-0}
  # Bytes of the output of earlier starts.
  earlier=$(stat -Lc %s /dev/fd/2)
  # The user's own, with which scancel would skip this job, or wait for a confirmation, and scontrol
  # shows times otherwise.
  unset -v "${!SCANCEL_@}" "${!SQUEUE_@}" SLURM_TIME_FORMAT
  trap leave USR1
  trap 'adm_told=yes; hurry' TERM  # the ranks get it too; this shell stays to record how they ended
}

begin
adm_before=$(cat "$run/launch/state.json" 2> /dev/null)

# One line, also of an answer of several.
say() {
  printf '%s  job %s start %s: %s\n' "$(date '+%F %T%z')" "$job" "$start" "${*//$'\n'/; }" |
    tee -a "$run/launch/events.txt"
}

refuse() {
  say "$1; not started"
  exit 78
}

# An entry of the state that the trainer records, or nothing.
state() {
  sed -n "s/^ \"$1\": \"\(.*\)\",*$/\1/p" "$run/launch/state.json" 2> /dev/null
}

# Opened, since NFS may show for a minute a file that was removed.
stop_requested() {
  { : < "$run/launch/stop"; } 2> /dev/null
}

newest() {
  newest=$(state checkpoint)
  echo "${newest:-none}"
}

# One of Slurm's commands: its answer, or its own words about what is wrong. It is repeated for five
# minutes while the controller is busy or restarting, and at once accepts a refusal.
ask() {
  for pause in 5 10 15 30 60 60 60 60 0; do
    if answer=$(trap '' TERM && "$@" 2>&1); then return 0; fi
    busy "$answer" || return 1
    sleep $pause
  done
  return 1
}

# Whether that is why a command failed, by its own words. It may have been obeyed all the same.
busy() {
  case $1 in
    *"imed out"* | *"nexpected message"* | *"Zero Bytes"* | *"nable to contact"* | *"onnection"* | *"standby mode"* | *"temporarily un"* | *"authentication error"*) ;;
    *) return 1 ;;
  esac
}

# A cancelled job stays cancelled, and a script whose node Slurm gave up must not requeue the next
# start. A second failure without a new checkpoint in between ends the job. A start that was told to
# leave has not failed, whatever its status; but where a time limit left no time to train twice, it
# would do so for ever.
again() {
  if [ -n "$adm_requeued" ]; then
    say "$1; requeued before, resumes from checkpoint $(newest)"
    return
  fi
  if ! ask scontrol show job -o "$job"; then
    say "$1; not requeued: $answer: rerun the same command to resume"
    return
  fi
  case $answer in
    *" JobState=RUNNING "*" Restarts=$start "*) ;;
    # A limit that was made shorter, or whose warning found no controller.
    *" JobState=COMPLETING Reason=TimeLimit "*" Restarts=$start "*) ;;
    *" Restarts=$start "*)
      if ! preempted; then
        say "$1; cancelled, by scancel or by Slurm"
        return
      fi ;;
    *)
      say "$1; requeued by Slurm"
      return ;;
  esac
  bad=
  mark=''
  if [ "$status" != 75 ] && [ -z "$adm_told" ]; then
    mark=failed-at now=$(newest) by='' way=''
    if out_of_memory; then  # no fault of the node's
      set -- "$1 (out of host memory)"
      way="; raise memory in the cluster file and rerun the same command"
    else
      bad=$(lost_twice)
    fi
  elif ! preempted && { [ "$1" != saved ] || [ "$(newest)" = "$at" ]; } && at_limit; then
    mark=limited-at now="$(newest) $limit" by=" by its time limit of $limit"
    way="; raise time in the cluster file and rerun the same command"
  fi
  if [ -n "$mark" ]; then
    if [ -z "$bad" ] && [ "$(cat "$run/launch/$mark" 2> /dev/null)" = "$now" ]; then
      say "$1$by, for the second time at checkpoint $(newest): not started again$way"
      return
    fi
    if ! echo "$now" > "$run/launch/$mark"; then  # a full disk: no start would know of this one
      say "$1; not requeued: cannot write $run/launch/$mark: rerun the same command to resume"
      return
    fi
  fi
  trap '' TERM  # as Slurm requeues a job it kills all that runs, before it is said here
  if [ -n "$bad" ]; then
    others=${answer##* ExcNodeList=}
    others=${others%% *}
    [ "$others" != "(null)" ] || others=
    follow_up "$1" "$bad lost ranks twice and is excluded" --exclude="${others:+$others,}$bad"
  elif [[ $answer == *" Requeue=0 "* ]]; then
    follow_up "$1" "this job may not be requeued"
  elif requeue; then
    adm_requeued=yes
    say "$1; requeued, resumes from checkpoint $(newest)"
  else
    follow_up "$1" "not requeued: $denial"
  fi
}

# Whether this start is preempted where the site cancels such jobs (PreemptMode=CANCEL), by the
# answer of scontrol. It answers the same where scancel came within the grace time; then the job's
# daemon says no cause.
preempted() {
  case $answer in
    *" JobState=COMPLETING "*" Restarts=$start "*" PreemptTime="[0-9]* | \
      *" JobState=PREEMPTED "*" Restarts=$start "*)
      ! printed "error: [*]{3} JOB $SLURM_JOB_ID ON .* CANCELLED AT [^ ]+ [*]{3}$" ;;
    *) false ;;
  esac
}

# Such a job is killed after KillWait, this shell too, whether or not the ranks have saved by then: it
# is requeued at once, which ends none of them sooner.
hurry() {
  [ -z "$adm_requeued" ] && ! stop_requested || return 0
  if ask scontrol show job -o "$job" && preempted; then again "preempted"; fi
}

# Put the job back into the queue. Where the first request timed out and was obeyed, Slurm refuses the second.
requeue() {
  if ask scontrol requeue "$job"; then return 0; fi
  denial=$answer
  ask scontrol show job -o "$job" && [[ $answer == *" Restarts="* && $answer != *" Restarts=$start "* ]]
}

# Whether the job's time ends in this minute or while the ranks save, by the answer of scontrol.
at_limit() {
  [[ $answer =~ " RunTime="([0-9:-]+)" TimeLimit="([0-9:-]+)" " ]] || return 1
  limit=${BASH_REMATCH[2]}
  [ $(($(seconds "$limit") - $(seconds "${BASH_REMATCH[1]}"))) -le 360 ]
}

# Those of a duration such as 1-02:03:04.
seconds() {
  IFS=-: read -r -a parts <<< "$1"
  total=0
  for part in "${parts[@]: -3}"; do total=$((total * 60 + 10#$part)); done
  [ ${#parts[@]} -lt 4 ] || total=$((total + 10#${parts[0]} * 86400))
  echo $total
}

# Whether Slurm ended ranks of this start at the job's limit of memory. A surviving rank sees only that
# they are gone, and the status of the job and of its steps may be that of another rank. srun says it,
# or, where Slurm measures memory itself (OverMemoryKill), the daemon of the job.
out_of_memory() {
  printed '^srun: error: .*: tasks? .*: Out Of Memory$|^slurmstepd-.*: error: Exceeded job memory limit$'
}

# Whether the output of this start has such a line.
printed() {
  [ -f /dev/fd/2 ] && [ -n "$(tail -c "+$((earlier + 1))" /dev/fd/2 | grep -aE "$1")" ]
}

# The nodes, with commas between them, that lost ranks in this start and in an earlier one. Slurm's
# name of a node may have a domain; one that a rank has by its machine may have more than Slurm's.
lost_twice() {
  if [ "$(cat "$run/launch/state.json" 2> /dev/null)" = "$adm_before" ]; then return; fi
  lost=$(state lost | tr , '\n')
  scontrol show hostnames "$SLURM_JOB_NODELIST" |
    grep -xFf <(sed 'p; s/[.].*//' <<< "$lost") |
    grep -xFf <(sed 'p; s/[.].*//' "$run/launch/lost-hosts" 2> /dev/null) | paste -sd,
  echo "$lost" >> "$run/launch/lost-hosts"
}

# Submit the same script, with further options, as a job that begins when this one has ended. Variables of this job would
# contradict its options.
follow_up() {
  recorded=$(cat "$run/launch/job" 2> /dev/null)
  if [ -n "$recorded" ] && [ "${recorded%%;*}" != "$job" ]; then return; fi  # submitted already
  forget=()
  for name in "${!SLURM_@}" "${!SBATCH_@}" "${!SRUN_@}"; do
    case $name in
      SLURM_CONF | SLURM_CONF_SERVER | SLURM_CLUSTERS | SBATCH_CLUSTERS | SLURM_JWT | SBATCH_QOS | SBATCH_RESERVATION) ;;
      *) forget+=(-u "$name") ;;
    esac
  done
  if ask submit "${@:3}"; then
    # sbatch may print warnings or a site's greeting around the job id.
    next=$(sed -nE 's/^(Submitted batch job )?([0-9]+)((;| on cluster )(.*))?$/\2;\5/p' <<< "$answer" | tail -n 1)
    echo "${next%;}" > "$run/launch/job"
    say "$1; $2; submitted job ${next%%;*}, which resumes from checkpoint $(newest)"
  else
    say "$1; $2; no job was submitted to follow: $answer: rerun the same command to resume"
  fi
}

# Where sbatch timed out, and is asked again, the job that it submitted may be in the queue.
submit() {
  queued=$(squeue --me -h -o '%i|%o' 2>&1) || ! busy "$queued" || { echo "$queued"; return 1; }
  while IFS='|' read -r next script; do
    if [ "$script" = "$run/launch/job.sh" ] && [ "$next" != "$job" ]; then
      echo "$next${recorded#"$job"}"  # with the name of the cluster, if one was recorded
      return
    fi
  done <<< "$queued"
  env "${forget[@]}" sbatch --parsable --dependency="afterany:$job" "$@" "$run/launch/job.sh"
}

# The signal is repeated, since a rank that is starting ignores it. The job must requeue itself before
# its time limit: after it Slurm would end the job for good. scancel would ask for a minute and a half
# again and again about a job that is ending, and tell its next start to leave.
leave() {
  adm_told=yes
  [ -z "$adm_timer" ] || return
  {
    for _ in 1 2 3 4 5 6 7 8 9; do
      timeout 5 scancel --signal=USR1 "$job" &
      sleep 30
    done
    again "did not leave in 270 s"
  } &
  adm_timer=$!
}

# End the timer of `leave`. While it hands the job on, it ignores this: then it is awaited, since a
# second follower would be submitted beside its own.
end_timer() {
  [ -n "$adm_timer" ] || return 0
  while kill "$adm_timer" 2> /dev/null; do sleep 0.1; done
}

# Run a command in the background, where a trap of this shell need not wait for it, and return its
# status. It comes through a pipe, which has room on a full disk, and so does the process number: `$!`
# may be of what a trap has started meanwhile. There is no `wait`: when a trap comes in a `wait`, bash
# loses the status, or waits for the timer of `leave` instead.
attend() {
  exec 9<> <(:)
  {
    trap : TERM USR1  # the command itself acts on them
    echo "$BASHPID" >&9
    "$@" 9>&-
    echo $? >&9
  } &
  until read -r -u 9 ranks; do :; done
  while kill -0 "$ranks" 2> /dev/null; do sleep 0.2; done
  read -r -t 1 -u 9 ended || ended=137
  return "$ended"
}

adm_functions=$(declare -f begin say refuse state stop_requested newest ask busy again preempted hurry requeue at_limit seconds out_of_memory printed lost_twice follow_up submit leave end_timer attend)

cd /home/me/adm || refuse 'cannot enter /home/me/adm'" on $(hostname): rerun the command in a directory that every machine has"
case $1 in check | rank) ;; *) unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK PMI_RANK PMI_SIZE PMIX_RANK ;; esac
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0
export OMP_NUM_THREADS=4
trap 'ended=$? failed=$setup setup=; [ -z "$failed" ] || refuse "the setup line ended the script with status $ended: $failed"' EXIT
setup='module load cuda/12.6'; eval "$setup" || { ended=$? failed=$setup setup=; refuse "the setup line failed with status $ended: $failed"; }
setup=; set +eEu; trap - ERR
export PATH=/home/me/adm/.venv/bin:$PATH
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0
export OMP_NUM_THREADS=4
export PYTHONPATH=/runs/imagenet64/code
export PYTHONSAFEPATH=1
eval "$adm_functions"
begin

for program in srun scancel scontrol; do
  command -v $program > /dev/null ||
    refuse "there is no $program on $(hostname), and without it the run could not save and requeue: \
add its directory to PATH in setup"
done
at=$(newest)
say "begins on $SLURM_JOB_NODELIST at checkpoint $at"
attend srun \
  --export=ALL \
  --mpi=none \
  --kill-on-bad-exit=0 \
  --wait=60 \
  --label \
  --cpus-per-task=12 \
  /home/me/adm/.venv/bin/python -m launch check \
  --ranks 512 \
  --gpus 8 \
  --run /runs/imagenet64 \
  --data /scratch/shards/imagenet64
status=$?
if [ -z "$adm_told" ] && [ $status -gt 128 ]; then
  again "a signal ended the check: status $status"
  exit $status
elif [ -z "$adm_told" ] && [ $status != 0 ]; then
  say "the check above found a fault; not started"
  exit 78
fi
if [ -n "$adm_told" ]; then
  end_timer
  again "told to leave before the ranks were started"
  exit 75
fi
attend srun \
  --export=ALL \
  --mpi=none \
  --kill-on-bad-exit=0 \
  --wait=60 \
  --label \
  --cpus-per-task=12 \
  sh -c 'trap "" USR1 TERM; exec "$0" "$@"' /home/me/adm/.venv/bin/python -m trainer.train /runs/imagenet64/launch/preset.toml \
  --run /runs/imagenet64 \
  --ds-config /runs/imagenet64/code/ds_config.json \
  --ranks 512 \
  --patience 600 \
  --gpus 8 \
  --set 'training.lr = 1e-4' \
  --set 'training.precision = "bf16"'
status=$?
end_timer

case $status in
  0)  # also what srun says when Slurm has given the job's node up
    if [ "$(state state)" = finished ]; then
      say "finished"
    elif stop_requested; then
      say "stopped as requested"
    else
      again "srun ended in mid-run"
    fi ;;
  78) say "refused for the reason above; not started again" ;;
  75)
    if stop_requested; then
      say "stopped as requested"
    elif [ "$(state why)" = "by a signal before the first step" ]; then
      again "told to leave before the first step"
    else
      again saved
    fi ;;
  *)
    if [ -n "$adm_told" ]; then
      again "told to leave, ended with status $status"
    else
      again "failed with status $status"
    fi ;;
esac
exit $status
