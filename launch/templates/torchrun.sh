if [ "$1" != node ]; then
  trap 'touch @stop@' INT TERM  # the ranks save and leave
  for host in @hosts@; do
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
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=@seconds@
@command@
