"""Sets of ablations: rows of settings, and what they came to."""
