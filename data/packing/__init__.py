"""Making datasets: sources, classes, the plan, and what packs it."""
