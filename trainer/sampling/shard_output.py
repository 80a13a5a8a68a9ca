"""Parts that become a packed dataset: each part is a shard, so nothing is copied to join them.

The images are PNG, exactly as drawn. An upsampler can enlarge such a directory, and a network can
be trained on it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import files
from data.dataset import write_index
from data.index import parse_index
from data.manifest import MANIFEST, NO_CLASS, Shard, manifest_text
from data.tars import ShardWriter
from data.transforms import png
from trainer.sampling.npz_output import WHOLE
from trainer.sampling.output import Output, numbered
from trainer.sampling.samplefile import RECORD


class ShardOutput(Output):
    """A directory of shards.

    `classes` are the names of the classes by number; none where there are no classes.
    """

    is_directory = True

    def __init__(
        self, path: Path, *, size: int, request: Mapping[str, Any], classes: Sequence[str]
    ) -> None:
        work = path.with_name(f"{path.name}.parts")
        super().__init__(path, work=work, size=size, request=request)
        self._classes = tuple(classes) or (NO_CLASS,)
        self._shards = self.work / "shards"

    def write(self, part: int, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        """As `Output.write`."""
        self._shards.mkdir(exist_ok=True)
        tar = self._shards / f"{part:06d}.tar"
        with files.whole(tar, writer=self.writer) as file:
            writer = ShardWriter(file)
            for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
                key = f"{part * self.batch + i:08d}"
                writer.add(key, image=png(image), suffix="png", label=label)
            index = writer.close()
        shard = write_index(tar, index, writer=self.writer)
        files.write(self._record(part), json.dumps(asdict(shard)), writer=self.writer)

    def listed(self) -> list[int]:
        """As `Output.listed`."""
        return numbered(self.work, ".json")

    def fault(self, part: int, labels: NDArray[np.int64]) -> str | None:
        """As `Output.fault`."""
        try:
            shard = Shard(**json.loads(self._record(part).read_text()))
            content = (self._shards / shard.index).read_bytes()
            index = parse_index(content, samples=len(labels), where=self._shards / shard.index)
            if not np.array_equal(index["label"], labels):
                return "its labels are not those of the request"
            if not shard.is_intact(self._shards):
                return "its shard has another checksum"
        except (OSError, ValueError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def has_foreign(self) -> bool:
        """As `Output.has_foreign`."""
        return bool(numbered(self.work, ".npz")) or (self.work / WHOLE).exists()

    def needed(self) -> int:
        """As `Output.needed`, without PNG's compression."""
        left = self.images - len(self.listed()) * self.batch
        return max(left, 0) * self.size**2 * 3

    def assemble(self, labels: NDArray[np.int64] | None) -> Path:
        """As `Output.assemble`."""
        records = [self._record(part) for part in range(self.parts)]
        text = manifest_text(
            tuple(Shard(**json.loads(record.read_text())) for record in records),
            classes=self._classes,
            image_size=self.size,
            made_by={"sample": "trainer.sample", RECORD: self.request},
        )
        for torn in self._shards.glob("*.partial"):
            torn.unlink()
        files.write(self._shards / MANIFEST, text)
        return self._shards

    def _record(self, part: int) -> Path:
        return self.work / f"{part:06d}.json"
