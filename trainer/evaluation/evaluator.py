"""The ranks compute features of images together, of samples and of what they are compared with."""

from collections.abc import Callable, Sequence
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
    """A network of features and the ranks that compute them. All ranks make each call together."""

    network: FeatureNetwork
    world: World
    device: torch.device
    #: Images at once.
    batch: int
    #: Hears what is done, on the main rank.
    say: Callable[[str], None] = lambda _: None
    #: Hears how many images were done, on every rank.
    on_images: Callable[[int], None] = lambda _: None

    def extract(self, samples: Samples, *, kept: Sequence[int]) -> Extracted | None:
        """The features of all samples, each rank its share; those of the places `kept` (ascending).

        The main rank gets them.

        Raises:
            Refused: an image is damaged, or its features are not finite.
        """
        if self.world.is_main:
            self.say(f"features of {samples.count:,} images of {samples.path}")
        mine = agreed(lambda: self._share(samples))
        return joined(mine, count=samples.count, kept=kept, device=self.device)

    def check(self, path: Path, *, size: tuple[int, int]) -> Reference | Samples:
        """A reference file's content, or the images that one is, for samples of a size.

        Raises:
            Refused: there is none, it is damaged, or is of another size or network.
        """
        content, images = self._open(path, size=size)
        found = content or images
        assert found is not None
        return found

    def check_samples(self, count: int, *, side: int, reference: Path) -> None:
        """Return if the network takes so many samples of a side, and the reference is of its kind.

        Raises:
            Refused: as `check`, or the network does not take them, or they are too few.
        """
        found = self.check(reference, size=(side, side))

        def compute() -> None:
            for size in {min(self.batch, count), count % self.batch} - {0}:
                images = torch.zeros(size, 3, side, side, dtype=torch.uint8, device=self.device)
                with torch.no_grad():
                    columns = self.network.compute(images).pool.shape[1]
            if isinstance(found, Reference):
                check_comparable(found, columns=columns)

        agreed(compute)

    def reference(self, path: Path, *, size: tuple[int, int]) -> Reference | None:
        """A reference file's content, or that of images, on the main rank.

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
        """The content of a reference file, and the images whose features are still unknown."""
        if from_main(lambda: references.is_statistics(path)):
            return agreed(lambda: references.load(path, network=self.network, size=size))
        samples = agreed(lambda: open_samples(path, size=size[0]))
        agreed(lambda: references.check_images(samples, size=size))
        return None, samples

    def of_images(self, samples: Samples) -> Reference | None:
        """The reference that a directory of shards or a sample file is; on the main rank."""
        found = self.extract(samples, kept=references.chosen(samples.count).tolist())
        return None if found is None else references.of_images(samples, found)

    def _share(self, samples: Samples) -> Share:
        own, batch, world = Share(), self.batch, self.world
        progress = Progress(total=samples.count, shown=world.is_main, say=self.say)
        for first in range(world.rank * batch, samples.count, world.size * batch):
            pixels = samples.images(first, min(first + batch, samples.count))
            images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)
            with torch.no_grad():
                found = self.network.compute(images)
            finite = torch.isfinite(found.pool).all(dim=1)
            if not finite.all():
                bad = first + int((~finite).nonzero()[0])
                raise ValueError(f"{samples.path}: the features of image {bad} are not finite")
            own.add(first, found, images=pixels)
            self.on_images(len(pixels))
            progress.advance(min(batch * world.size, samples.count - first))
        return own
