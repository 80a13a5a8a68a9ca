#!/bin/bash
# imagenet64: 64 x 8 ranks by mpirun.
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

need mpirun

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

begin mpirun -np 512 \
  --host n1:8,n2:8,n3:8,n4:8,n5:8,n6:8,n7:8,n8:8,n9:8,n10:8,n11:8,n12:8,n13:8,n14:8,n15:8,n16:8,n17:8,n18:8,n19:8,n20:8,n21:8,n22:8,n23:8,n24:8,n25:8,n26:8,n27:8,n28:8,n29:8,n30:8,n31:8,n32:8,n33:8,n34:8,n35:8,n36:8,n37:8,n38:8,n39:8,n40:8,n41:8,n42:8,n43:8,n44:8,n45:8,n46:8,n47:8,n48:8,n49:8,n50:8,n51:8,n52:8,n53:8,n54:8,n55:8,n56:8,n57:8,n58:8,n59:8,n60:8,n61:8,n62:8,n63:8,n64:8 \
  --map-by ppr:8:node \
  --bind-to none \
  -x PATH bash /runs/imagenet64/launch/job.sh rank && finish
