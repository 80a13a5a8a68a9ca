#!/bin/bash
# imagenet64: 64 x 8 ranks by deepspeed.
refuse() {
  echo "error: $(hostname): $1" >&2
  exit 78
}

cd /home/me/adm || refuse 'cannot enter /home/me/adm'" on $(hostname): rerun the command in a directory that every machine has"
case $1 in check | rank) ;; *) unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK PMI_RANK PMI_SIZE PMIX_RANK ;; esac
export PATH=/home/me/adm/.venv/bin:$PATH
export GLOO_SOCKET_IFNAME=eth0
export NCCL_SOCKET_IFNAME=eth0
export PYTHONPATH=/runs/imagenet64/code
export PYTHONSAFEPATH=1

need() {
  for program; do
    command -v "$program" > /dev/null ||
      refuse "there is no $program here: install it, or add its directory to PATH in setup"
  done
}

case $1 in
  try) need /home/me/adm/.venv/bin/python; echo "clock $(date +%s)"; exit ;;
  rank) exec /home/me/adm/.venv/bin/python -m trainer.train /runs/imagenet64/launch/preset.toml \
  --run /runs/imagenet64 \
  --ds-config /runs/imagenet64/code/ds_config.json \
  --ranks 512 \
  --patience 600 \
  --gpus 8 \
  --set 'training.lr = 1e-4' \
  --set 'training.precision = "bf16"' ;;
esac

hosts=(n1 n2 n3 n4 n5 n6 n7 n8 n9 n10 n11 n12 n13 n14 n15 n16 n17 n18 n19 n20 n21 n22 n23 n24 n25 n26 n27 n28 n29 n30 n31 n32 n33 n34 n35 n36 n37 n38 n39 n40 n41 n42 n43 n44 n45 n46 n47 n48 n49 n50 n51 n52 n53 n54 n55 n56 n57 n58 n59 n60 n61 n62 n63 n64)
need ssh pdsh
# A host that cannot start its ranks would keep the others waiting: all are tried before any is started.
try() {
  local begun said
  begun=$(date +%s)
  said=$(ssh -o BatchMode=yes -o ConnectTimeout=60 -o LogLevel=ERROR "$1" 'bash /runs/imagenet64/launch/job.sh try' < /dev/null) || return
  # By how many seconds its clock is ahead of this machine's, at least and at most.
  [[ ! $said =~ "clock "([0-9]+) ]] || echo "$1 $((BASH_REMATCH[1] - $(date +%s))) $((BASH_REMATCH[1] - begun))" >&8
}

tries=() far=() bad=()
exec 8<> <(:)
for host in "${hosts[@]}"; do
  try "$host" &
  tries+=($!)
done
for i in "${!hosts[@]}"; do
  wait "${tries[i]}"
  case $? in
    0) ;;
    255) far+=("${hosts[i]}") ;;  # of ssh itself
    *) bad+=("${hosts[i]}") ;;
  esac
done
[ ${#far[@]} = 0 ] ||
  refuse "ssh to ${far[*]} failed, see above: every machine of hosts must accept ssh without a password, from a machine that knows its host key"
[ ${#bad[@]} = 0 ] || refuse "${bad[*]} cannot start the job, see above"

# Ctrl-C, TERM and a closed terminal ask the ranks by a file to save and leave. The launcher has a
# session of its own, which the terminal's signals do not reach; what it prints passes a process that
# outlives the terminal.
leave() {
  touch /runs/imagenet64/launch/stop
  if [ "$1" = INT ] && [ $((SECONDS - ${asked:-$SECONDS})) -gt 3 ]; then kill "${agents[@]}"; fi
  asked=${asked:-$SECONDS}
  echo "stop requested: the ranks save and stop (Ctrl-C again ends it at once)"
}
trap 'leave INT' INT
trap leave TERM HUP
trap : PIPE  # from its own messages

begin() {
  setsid "$@" > >(trap '' INT TERM HUP && exec tee -p -a /dev/null) 2>&1 &
  agents+=($!)
}

# Wait for all agents; the status of the last one that failed.
finish() {
  failure=0
  for agent in "${agents[@]}"; do
    while kill -0 "$agent" 2> /dev/null; do wait "$agent"; done  # a signal ends a wait
    wait "$agent" || failure=$?
  done
  agents=()
  return $failure
}

printf '%s\n' 'n1 slots=8' 'n2 slots=8' 'n3 slots=8' 'n4 slots=8' 'n5 slots=8' 'n6 slots=8' 'n7 slots=8' 'n8 slots=8' 'n9 slots=8' 'n10 slots=8' 'n11 slots=8' 'n12 slots=8' 'n13 slots=8' 'n14 slots=8' 'n15 slots=8' 'n16 slots=8' 'n17 slots=8' 'n18 slots=8' 'n19 slots=8' 'n20 slots=8' 'n21 slots=8' 'n22 slots=8' 'n23 slots=8' 'n24 slots=8' 'n25 slots=8' 'n26 slots=8' 'n27 slots=8' 'n28 slots=8' 'n29 slots=8' 'n30 slots=8' 'n31 slots=8' 'n32 slots=8' 'n33 slots=8' 'n34 slots=8' 'n35 slots=8' 'n36 slots=8' 'n37 slots=8' 'n38 slots=8' 'n39 slots=8' 'n40 slots=8' 'n41 slots=8' 'n42 slots=8' 'n43 slots=8' 'n44 slots=8' 'n45 slots=8' 'n46 slots=8' 'n47 slots=8' 'n48 slots=8' 'n49 slots=8' 'n50 slots=8' 'n51 slots=8' 'n52 slots=8' 'n53 slots=8' 'n54 slots=8' 'n55 slots=8' 'n56 slots=8' 'n57 slots=8' 'n58 slots=8' 'n59 slots=8' 'n60 slots=8' 'n61 slots=8' 'n62 slots=8' 'n63 slots=8' 'n64 slots=8' > /runs/imagenet64/launch/hostfile
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND-} -o ServerAliveInterval=30 -o ServerAliveCountMax=30"
cd /
begin env -u PYTHONPATH /home/me/adm/.venv/bin/python -m deepspeed.launcher.runner \
  --hostfile /runs/imagenet64/launch/hostfile \
  --launcher pdsh \
  --force_multi \
  --no_python \
  --no_local_rank \
  --master_port 25779 \
  bash /runs/imagenet64/launch/job.sh rank
finish
