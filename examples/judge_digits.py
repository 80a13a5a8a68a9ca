"""How many drawn digits an independent judge recognises: an SVM trained on the real 8x8 digits.

    python examples/judge_digits.py guided.npz unguided.npz

The judge has seen no drawn image, and no network of ours any part of the judge.
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

#: The rate of the first file below which this is a failure.
LEAST = 0.9


def recognised(judge: SVC, file: Path) -> float:
    """The share of a sample file's images, uint8 (N, S, S, 3), that the judge reads as labelled."""
    with np.load(file) as samples:
        images, labels = samples["arr_0"], samples["arr_1"]
    return float((judge.predict(as_digits(images)) == labels).mean())


def as_digits(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Grey 8x8 means in the judge's range 0 to 16, flat (N, 64)."""
    count, side = images.shape[:2]
    blocks = images.astype(np.float64).reshape(count, 8, side // 8, 8, side // 8, 3)
    return (blocks.mean(axis=(2, 4, 5)) * 16 / 255).reshape(count, 64)


def main(files: list[str]) -> None:
    """Print the judge's own accuracy, then its rate on each file; fail below `LEAST`."""
    pixels, labels = load_digits(return_X_y=True)
    judge = SVC(gamma=0.001)
    accuracy = cross_val_score(judge, pixels, labels, cv=5).mean()
    print(f"the judge on real digits that it has not seen: {accuracy:.1%}")
    judge.fit(pixels, labels)
    rates = {file: recognised(judge, Path(file)) for file in files}
    for file, rate in rates.items():
        print(f"recognised in {file}: {rate:.1%}")
    if rates[files[0]] < LEAST:
        sys.exit(
            f"fewer than {LEAST:.0%} of {files[0]} are recognised: the networks learned too little"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
