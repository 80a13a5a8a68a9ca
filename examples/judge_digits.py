"""How many drawn digits an independent classifier recognises: an SVM trained on the real digits.

    python examples/judge_digits.py guided.npz unguided.npz

The SVM is trained on no drawn image, and it has no part in the networks' training.
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

# The exit status is 1 when less of the first file is recognised.
LEAST = 0.9


def recognised(judge: SVC, file: Path) -> float:
    """The share of a sample file's images, uint8 (N, S, S, 3), whose label the judge predicts."""
    with np.load(file) as samples:
        images, labels = samples["arr_0"], samples["arr_1"]
    return float((judge.predict(as_digits(images)) == labels).mean())


def as_digits(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The images as gray 8x8 pixels from 0 to 16, flat (N, 64)."""
    count, side = images.shape[:2]
    blocks = images.astype(np.float64).reshape(count, 8, side // 8, 8, side // 8, 3)
    return (blocks.mean(axis=(2, 4, 5)) * 16 / 255).reshape(count, 64)


def main(files: list[str]) -> None:
    """Print the judge's accuracy on real digits, then its rate on each file."""
    pixels, labels = load_digits(return_X_y=True)
    judge = SVC(gamma=0.001)
    accuracy = cross_val_score(judge, pixels, labels, cv=5).mean()
    print(f"accuracy of the judge on held-out real digits: {accuracy:.1%}")
    judge.fit(pixels, labels)
    rates = {file: recognised(judge, Path(file)) for file in files}
    for file, rate in rates.items():
        print(f"recognised in {file}: {rate:.1%}")
    if rates[files[0]] < LEAST:
        sys.exit(
            f"fewer than {LEAST:.0%} of {files[0]} were recognised: the networks are undertrained"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
