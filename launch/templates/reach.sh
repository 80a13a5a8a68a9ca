# A host that cannot start its ranks would keep the others waiting: all are tried before any is started.
try() {
  local begun said
  begun=$(date +%s)
  said=$(ssh -o BatchMode=yes -o ConnectTimeout=60 -o LogLevel=ERROR "$1" @command@ < /dev/null) || return
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
