"""The experiment: its settings, the presets that give them, and DeepSpeed's file beside them."""
