"""Examples: what `make quickstart` runs."""
