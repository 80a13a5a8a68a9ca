# A host that cannot start its ranks would keep the others waiting: all are tried before any is started.
tries=() far=() bad=()
for host in "${hosts[@]}"; do
  ssh -o BatchMode=yes -o ConnectTimeout=60 -o LogLevel=ERROR "$host" @command@ < /dev/null > /dev/null &
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
  refuse "ssh to ${far[*]} failed, see above: every machine of hosts must accept ssh without a password"
[ ${#bad[@]} = 0 ] || refuse "${bad[*]} cannot start the job, see above"
