
# Machines of torchrun tell each other by their clocks that they live: it takes one that is 10 to 15
# seconds behind another for lost.
echo . >&8
slow='' fast=''
while read -r -u 8 host least most && [ "$host" != . ]; do
  if [ -z "$fast" ] || [ "$least" -gt "$ahead" ]; then fast=$host ahead=$least; fi
  if [ -z "$slow" ] || [ "$most" -lt "$behind" ]; then slow=$host behind=$most; fi
done
exec 8>&-
[ -z "$slow" ] || [ $((ahead - behind)) -le 8 ] ||
  refuse "the clock of $slow is $((ahead - behind)) s behind that of $fast, and torchrun takes such a machine for lost: set all clocks by one time server, as chrony does"
