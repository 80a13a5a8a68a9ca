refuse() {
  echo "error: $(hostname): $1" >&2
  exit @refused@
}
