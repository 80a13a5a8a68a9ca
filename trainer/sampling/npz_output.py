"""Parts that become the ADM evaluator's `.npz`: uint8 NHWC in `arr_0`, labels in `arr_1`.

Each part is an `.npz` of its own first. They are joined by moving a few at a time into the file, so
that the disk never holds all images twice; a journal says which parts are moved, so that an
interrupted move can be continued.
"""

import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data import files, npz
from data.progress import Progress
from trainer.sampling.output import Output, numbered
from trainer.sampling.samplefile import RECORD

# What the file is called while parts are moved into it.
WHOLE = "whole.npz"
# How many bytes of parts are moved before the journal is written and they are removed.
_MOVED = 2**26


class NpzOutput(Output):
    """An `.npz` file."""

    is_directory = False

    def __init__(self, path: Path, *, size: int, request: Mapping[str, Any]) -> None:
        super().__init__(path, work=path.with_suffix(".parts"), size=size, request=request)
        self._whole, self._journal = self.work / WHOLE, self.work / "whole.json"
        self._header = npz.image_header((self.images, size, size, 3))
        # The journal, read once for all parts that are checked.
        self._known: dict[int, int] | None = None

    def write(self, part: int, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        """As `Output.write`."""
        with files.whole(self._file(part), writer=self.writer) as stream:
            np.savez(stream, images=images, labels=labels)

    def _is_taken(self) -> bool:
        return self.path.exists()  # a file cannot replace a directory

    def listed(self) -> list[int]:
        """As `Output.listed`."""
        return sorted({*numbered(self.work, ".npz"), *self._moved()})

    def fault(self, part: int, labels: NDArray[np.int64]) -> str | None:
        """As `Output.fault`."""
        if self._file(part).exists():
            return part_fault(self._file(part), shape=self._shape(part), labels=labels)
        with self._whole.open("rb") as stream:
            content = self._content(stream, part)
        if self._known is None:
            self._known = self._moved()
        if zlib.crc32(content) != self._known[part]:
            return f"its bytes in {self._whole.name} have another checksum"
        return None

    def has_foreign(self) -> bool:
        """As `Output.has_foreign`."""
        return bool(numbered(self.work, ".json"))

    def needed(self) -> int:
        """As `Output.needed`."""
        there = sum(self._bytes(part) for part in self.listed())
        whole = self.images * self.size**2 * 3
        # While a few parts are moved, the disk holds them twice.
        return whole - there + min(whole, max(_MOVED, self._bytes(0)))

    def assemble(self, labels: NDArray[np.int64] | None) -> Path:
        """As `Output.assemble`."""
        self._whole.touch()
        with self._whole.open("r+b") as stream:
            moved = self._move(stream)
            info = _member_info(len(self._header) + self.images * self.size**2 * 3)
            info.CRC = self._checksum(stream, moved)
            stream.seek(0)
            stream.write(info.FileHeader(zip64=True) + self._header)
            stream.seek(self._offset(0) - len(self._header) + info.file_size)
            stream.truncate()
            with zipfile.ZipFile(stream, "w") as archive:
                archive.filelist.append(info)
                if labels is not None:
                    npz.add(archive, {"arr_1": labels})
                npz.add(archive, {RECORD: np.array(json.dumps(self.request))})
            stream.flush()
        files.sync(self._whole)
        return self._whole

    def _move(self, stream: BinaryIO) -> dict[int, int]:
        """Move the parts that still have a file of their own; returns the CRC-32 of every part."""
        moved, left, self._known = self._moved(), numbered(self.work, ".npz"), None
        count = max(1, _MOVED // self._bytes(0))
        progress = Progress(total=len(left), unit="batches joined", say=_say)
        for group in (left[i : i + count] for i in range(0, len(left), count)):
            for part in progress.over(group):
                content = self._read(part).tobytes()
                stream.seek(self._offset(part))
                stream.write(content)
                moved[part] = zlib.crc32(content)
            stream.flush()
            files.sync(self._whole)
            files.write(self._journal, json.dumps(moved))
            for part in group:
                self._file(part).unlink()
        return moved

    def _checksum(self, stream: BinaryIO, moved: Mapping[int, int]) -> int:
        """The CRC-32 of the whole array; ValueError where a part is not as it was moved."""
        total = zlib.crc32(self._header)
        progress = Progress(total=self.parts, unit="joined batches checked", say=_say)
        for part in progress.over(range(self.parts)):
            content = self._content(stream, part)
            if zlib.crc32(content) != moved.get(part):
                raise ValueError(
                    f"part {part} in {self._whole} is damaged; rerun the same command to draw it "
                    "again"
                )
            total = zlib.crc32(content, total)
        return total

    def _read(self, part: int) -> NDArray[np.uint8]:
        file = self._file(part)
        try:
            images: NDArray[np.uint8] = npz.read(file, "images")
        except ValueError as error:
            raise ValueError(
                f"{file} is damaged: {error}; rerun the same command to draw it again"
            ) from None
        return images

    def _content(self, stream: BinaryIO, part: int) -> bytes:
        stream.seek(self._offset(part))
        return stream.read(self._bytes(part))

    def _moved(self) -> dict[int, int]:
        """The CRC-32 of each part that was moved, as the journal has it."""
        try:
            return {int(part): crc for part, crc in json.loads(self._journal.read_text()).items()}
        except (OSError, ValueError):
            return {}

    def _file(self, part: int) -> Path:
        return self.work / f"{part:06d}.npz"

    def _shape(self, part: int) -> tuple[int, ...]:
        count = min(self.batch, self.images - part * self.batch)
        return (count, self.size, self.size, 3)

    def _bytes(self, part: int) -> int:
        return int(np.prod(self._shape(part)))

    def _offset(self, part: int) -> int:
        """The byte of the file at which a part begins: the array is the file's first member."""
        header = len(_member_info(0).FileHeader(zip64=True)) + len(self._header)
        return header + part * self._bytes(0)


def _say(text: str) -> None:
    print(text, flush=True)


def part_fault(file: Path, *, shape: Sequence[int], labels: NDArray[np.int64]) -> str | None:
    """What is wrong with a part's file, which must have uint8 images of `shape`, (B, H, W, 3), and
    these labels (B,); None for nothing. Reads every byte.
    """
    try:
        images, recorded = npz.read(file, "images"), npz.read(file, "labels")
    except ValueError as error:
        return str(error)
    if images.dtype != np.uint8 or images.shape != tuple(shape):
        return f"its images are {images.dtype} {images.shape} instead of uint8 {tuple(shape)}"
    if recorded.dtype != np.int64 or not np.array_equal(recorded, labels):
        return "its labels are not those of the request"
    return None


def _member_info(size: int) -> zipfile.ZipInfo:
    """The zip entry of the images' array of `size` bytes, still without its checksum."""
    info = zipfile.ZipInfo("arr_0.npy")
    info.CRC = info.header_offset = 0
    info.file_size = info.compress_size = size
    return info
