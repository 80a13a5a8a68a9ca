"""A part of a sample file is whole, or its fault is found."""

from pathlib import Path

import numpy as np

from trainer.npz_output import NpzOutput, part_fault


def test_a_part_that_is_cut_or_has_another_bit_is_found(tmp_path: Path) -> None:
    images = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    labels = np.array([3, 1])
    request = {"images": 2, "batch": 2}
    output = NpzOutput(tmp_path / "a.npz", size=4, request=request)
    output.work.mkdir()
    file = output.work / "000000.npz"
    output.write(0, images.transpose(0, 2, 3, 1), labels)
    assert not file.with_name(f"{file.name}.partial").exists()
    whole = file.read_bytes()

    def fault() -> str | None:
        return part_fault(file, shape=(2, 4, 4, 3), labels=labels)

    assert fault() is None
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        assert fault() is not None, size
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        file.write_bytes(damaged)
        if fault() is None:  # a bit that says nothing of the content, such as the time of writing
            with np.load(file) as part:
                assert np.array_equal(part["images"], images.transpose(0, 2, 3, 1)), place
