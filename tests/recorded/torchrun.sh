#!/bin/bash
# imagenet64: 64 x 8 ranks by torchrun.
cd /home/me/adm || exit
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
export PATH=/home/me/adm/.venv/bin:$PATH
export GLOO_SOCKET_IFNAME=eth0
export NCCL_SOCKET_IFNAME=eth0
export PYTHONPATH=/runs/imagenet64/code
export PYTHONSAFEPATH=1

if [ "$1" != node ]; then
  trap 'touch /runs/imagenet64/launch/stop' INT TERM  # the ranks save and leave
  for host in n1 n2 n3 n4 n5 n6 n7 n8 n9 n10 n11 n12 n13 n14 n15 n16 n17 n18 n19 n20 n21 n22 n23 n24 n25 n26 n27 n28 n29 n30 n31 n32 n33 n34 n35 n36 n37 n38 n39 n40 n41 n42 n43 n44 n45 n46 n47 n48 n49 n50 n51 n52 n53 n54 n55 n56 n57 n58 n59 n60 n61 n62 n63 n64; do
    ssh "$host" bash "$(realpath "$0")" node & agents+=($!)
  done
  for agent in "${agents[@]}"; do
    while kill -0 "$agent" 2> /dev/null; do wait "$agent"; done  # a signal ends a wait
    wait "$agent" || status=$?
  done
  exit "${status:-0}"
fi
# A rebooted machine must be able to rejoin, and ranks need time to save after TERM.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300
/home/me/adm/.venv/bin/python -m torch.distributed.run \
  --nnodes=64 \
  --nproc-per-node=8 \
  --rdzv-backend=c10d \
  --rdzv-endpoint=n1:29500 \
  --rdzv-id=imagenet64 \
  --rdzv-conf=join_timeout=600,last_call_timeout=5 \
  --max-restarts=3 -m -- trainer.train /runs/imagenet64/launch/preset.toml \
  --run /runs/imagenet64 \
  --ds-config /runs/imagenet64/code/ds_config.json \
  --ranks 512 \
  --patience 600 \
  --set 'training.lr = 1e-4' \
  --set 'training.precision = "bf16"'
