"""Before a run starts: what its steps cost, and what a machine needs."""
