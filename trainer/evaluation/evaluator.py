"""All ranks compute features together, of samples and of the images they are compared with."""

import time
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.progress import Progress
from trainer.evaluation import reference as references
from trainer.evaluation.extraction import Extracted, Share, joined
from trainer.evaluation.features import FeatureNetwork
from trainer.evaluation.reference import Reference
from trainer.evaluation.results import check_comparable
from trainer.ranks.group import agreed, from_main
from trainer.ranks.world import World
from trainer.sampling.samplefile import Samples, open_samples


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """A feature network and the ranks that compute with it. All ranks make each call together."""

    network: FeatureNetwork
    world: World
    device: torch.device
    batch_size: int
    #: Prints a line about the progress; called on the main rank.
    say: Callable[[str], None] = lambda _: None
    #: Called on every rank with the number of images after each batch.
    on_images: Callable[[int], None] = lambda _: None
    #: By which rate and time left are.
    clock: Callable[[], float] = time.monotonic

    def extract(self, samples: Samples, *, kept: Container[int]) -> Extracted | None:
        """Statistics of the features of all samples, and the features of the images `kept`.

        `kept` are positions. Every rank computes a share; the main rank gets the result.

        Raises:
            Refused: the file or an image is damaged, or its features are not finite.
        """
        from_main(samples.checksum)  # finds a damaged file before the features are computed
        if self.world.is_main:
            self.say(f"features of {samples.count:,} images of {samples.path}")
        mine = agreed(lambda: self._share(samples, kept=kept))
        return joined(mine, count=samples.count, device=self.device)

    def check(self, path: Path, *, size: tuple[int, int]) -> Reference | Samples:
        """Open a reference for samples of a height and width, without computing features.

        Returns the content of a file of statistics, otherwise the images to compare with.

        Raises:
            Refused: there is none, it is damaged, or is of another size or network.
        """
        content, images = self._open(path, size=size)
        found = content or images
        assert found is not None
        return found

    def check_samples(self, count: int, *, side: int, reference: Path) -> None:
        """Return if `count` samples of `side` pixels can be compared with a reference.

        The network is tried on black images, in the batch sizes that there will be.

        Raises:
            Refused: as `check`, or the network does not take such images, or the reference does
                not fit the network's features or has too few images.
        """
        found = self.check(reference, size=(side, side))

        def compute() -> None:
            for size in {min(self.batch_size, count), count % self.batch_size} - {0}:
                images = torch.zeros(size, 3, side, side, dtype=torch.uint8, device=self.device)
                with torch.no_grad():
                    columns = self.network.compute(images).pool.shape[1]
            if isinstance(found, Reference):
                check_comparable(found, columns=columns)

        agreed(compute)

    def reference(self, path: Path, *, size: tuple[int, int]) -> Reference | None:
        """The reference with the features that it lacks, which are computed; on the main rank.

        Raises:
            Refused: as `check`, or an image is damaged.
        """
        content, images = self._open(path, size=size)
        if images is None:
            return content
        if content is None:
            return self.of_images(images)
        features = self.extract(images, kept=range(images.count))
        return None if features is None else replace(content, features=features.features)

    def _open(
        self, path: Path, *, size: tuple[int, int]
    ) -> tuple[Reference | None, Samples | None]:
        """The content of a file of statistics, and the images whose features are to be computed."""
        if from_main(lambda: references.is_statistics(path)):
            return agreed(lambda: references.load(path, network=self.network, size=size))
        samples = agreed(lambda: open_samples(path, size=size[0]))
        agreed(lambda: references.check_images(samples, size=size))
        return None, samples

    def of_images(self, samples: Samples) -> Reference | None:
        """The reference that a directory of shards or a sample file is; on the main rank."""
        found = self.extract(samples, kept=set(references.chosen(samples.count).tolist()))
        return None if found is None else references.of_images(samples, found)

    def _share(self, samples: Samples, *, kept: Container[int]) -> Share:
        own, size, world = Share(kept=kept), self.batch_size, self.world
        progress = Progress(
            total=samples.count, shown=world.is_main, say=self.say, clock=self.clock
        )
        for first in range(world.rank * size, samples.count, world.size * size):
            pixels = samples.images(first, min(first + size, samples.count))
            images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)
            with torch.no_grad():
                found = self.network.compute(images)
            finite = torch.isfinite(found.pool).all(dim=1)
            if not finite.all():
                bad = first + int((~finite).nonzero()[0])
                raise ValueError(f"{samples.path}: the features of image {bad} are not finite")
            own.add(first, found, images=pixels)
            self.on_images(len(pixels))
            progress.advance(min(size * world.size, samples.count - first))
        return own
