"""The run directory: what a run leaves on disk, who may write it, and what its files say."""
