refuse() {
  echo "error: $1" >&2
  exit @refused@
}

@preamble@

@start@
