"""The step of the optimizer: DeepSpeed-ZeRO, and how a network computes."""
