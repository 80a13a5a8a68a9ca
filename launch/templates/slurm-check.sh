attend @srun@
status=$?
if [ -z "$adm_told" ] && [ $status -gt 128 ]; then
  again "a signal ended the check: status $status"
  exit $status
elif [ -z "$adm_told" ] && [ $status != 0 ]; then
  say "the check above found a fault; not started"
  exit @refused@
fi
