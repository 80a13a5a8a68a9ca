"""Measurements, as commands: `python -m bench.NAME`."""
