"""The paper's mathematics (Dhariwal & Nichol, arXiv:2105.05233): torch only, no processes, no I/O.

Needs only torch: the nets (`unet`), the diffusion process (`diffusion`), what is minimised
(`objective`), how images are drawn (`sampler`) and reproducible randomness (`keyed`).
"""
