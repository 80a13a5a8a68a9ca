@refuse@

@preamble@

need() {
  for program; do
    command -v "$program" > /dev/null ||
      refuse "there is no $program here: install it, or add its directory to PATH in setup"
  done
}

case $1 in
  try) need @python@; echo "clock $(date +%s)"; exit ;;
@modes@
esac

@before@

# Ctrl-C, TERM and a closed terminal ask the ranks by a file to save and leave. The launcher has a
# session of its own, which the terminal's signals do not reach; what it prints passes a process that
# outlives the terminal.
leave() {
  touch @stop@
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

@start@
