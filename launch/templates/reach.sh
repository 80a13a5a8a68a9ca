# A host that ssh does not reach would keep the others waiting: all are tried before any is started.
tries=() far=()
for host in "${hosts[@]}"; do
  ssh -o BatchMode=yes -o ConnectTimeout=60 -o LogLevel=ERROR "$host" true < /dev/null &
  tries+=($!)
done
for i in "${!hosts[@]}"; do wait "${tries[i]}" || far+=("${hosts[i]}"); done
[ ${#far[@]} = 0 ] ||
  refuse "ssh to ${far[*]} failed, see above: every machine of hosts must accept ssh without a password"
