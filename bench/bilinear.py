"""Images enlarged without an upsampler, for comparison: `python -m bench.bilinear SHARDS OUT.npz`.

Packed images are reduced to half their side by area means and enlarged again bilinearly.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import files
from trainer.sampling.samplefile import open_samples


def enlarge_bilinearly(shards: Path, path: Path, *, images: int) -> None:
    """What needs no upsampler: packed images, reduced to half by area means and enlarged again."""
    samples = open_samples(shards)
    pixels = torch.from_numpy(samples.images(0, images)).permute(0, 3, 1, 2).float()
    side = pixels.shape[-1]
    small = F.interpolate(pixels, (side // 2, side // 2), mode="area").round()
    large = F.interpolate(small, (side, side), mode="bilinear").round().clamp(0, 255)
    with files.whole(path) as file:
        np.savez(file, arr_0=large.permute(0, 2, 3, 1).to(torch.uint8).numpy())


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.bilinear", description=__doc__)
    parser.add_argument("shards", type=Path, help="a directory of packed images")
    parser.add_argument("out", type=Path, help="the .npz to write")
    parser.add_argument("--images", type=int, default=500, help="how many (default: %(default)s)")
    options = parser.parse_args()
    enlarge_bilinearly(options.shards, options.out, images=options.images)
    return 0


if __name__ == "__main__":
    sys.exit(main())
