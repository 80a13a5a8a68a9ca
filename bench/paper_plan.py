"""What `python -m bench.paper` does: its commands in their order, and the files they make."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.run.runstate import RunState

# A network that is trained in minutes.
_SMALL = ("model.channels = 32",)
# That of the digits, which is guided in every way, is trained for longer.
_LONG = ("training.label_dropout = 0.2", "training.images = 76_800")
_STEPS = "ddim25"
_SCALES, _UNCONDITIONAL_SCALES, _FACTORS = "0,0.5,1,2,4,8", "0,1,4,10", "1,1.5,2,3,5"
# Ancestral sampling, for comparison, and the scales that it is compared at.
_ANCESTRAL, _COMPARED = "250", "0,2"
_PHOTOS = 2000
_ABLATION = """base = "digits"
set = ['data.shards = "{out}/digits"', "model.channels = 32"]

[samples]
images = {images}
steps = "ddim25"
reference = "{out}/digits-reference.npz"
network = "{out}/judge.pt2"

[[rows]]
name = "base"

[[rows]]
name = "two blocks"
set = ["model.blocks = 2"]

[[rows]]
name = "attention at 8 and 4"
set = ["model.attention = [8, 4]"]

[[rows]]
name = "convolutions resample"
set = ['model.resample = "conv"']

[[rows]]
name = "added embedding"
set = ['model.conditioning = "add"']

[[rows]]
name = "predicts the image"
set = ['diffusion.predict = "x0"']
"""


@dataclass(frozen=True)
class Step:
    """A command of the project, and what tells that it need not be run again."""

    name: str
    command: tuple[str, ...]
    #: A file; or a run, which must be finished; or an ablation's table, which must be whole.
    made: Path
    #: CPU seconds that it took once, for the time left.
    cost: float
    #: Whether it shares its work among ranks.
    on_ranks: bool = True

    @property
    def is_done(self) -> bool:
        """Whether what it makes is there."""
        if self.made.suffix == ".md":
            return self.made.exists() and "not done yet" not in self.made.read_text()
        if self.made.suffix:
            return self.made.exists()
        state = RunState.read(self.made)
        return state is not None and state.state == "finished"


@dataclass(frozen=True)
class Drawn:
    """A sample file, as a row of the table."""

    path: Path
    network: str
    guidance: str
    steps: str
    #: The factor of the guidance; None where it is in no sweep.
    factor: float | None = None

    @property
    def figures(self) -> Path:
        """Its evaluation."""
        return self.path.with_suffix(".evaluation.json")


@dataclass(frozen=True)
class Plan:
    """All of it, in a directory."""

    out: Path
    images: int

    @property
    def ablation(self) -> str:
        """The set of the ablation, in TOML."""
        return _ABLATION.format(out=self.out, images=self.images)

    def digits(self) -> list[Drawn]:
        """The files of digits."""
        found = self._sweep("conditional", "scale", _SCALES)
        found += self._sweep("unconditional", "scale", _UNCONDITIONAL_SCALES)
        found += self._sweep("free", "cfg", _FACTORS)
        for scale in _COMPARED.split(","):
            path = self.samples(f"{_ANCESTRAL}-scale{scale}")
            found.append(Drawn(path, "conditional", f"classifier, scale {scale}", _ANCESTRAL))
        return found

    def photos(self) -> list[Drawn]:
        """The files of photographs."""
        names = {
            "two-stages": "8 px drawn, enlarged by the upsampler",
            "one-stage": "16 px drawn",
            "enlarged": "8 px real, enlarged by the upsampler",
            "bilinear": "8 px real, enlarged bilinearly",
        }
        return [Drawn(self.samples(stem), name, "", _STEPS) for stem, name in names.items()]

    def steps(self) -> list[Step]:
        """All commands."""
        return [*self._data(), *self._trainings(), *self._drawings(), *self._evaluations()]

    def samples(self, stem: str) -> Path:
        """The sample file of that name."""
        return self.out / "samples" / f"{stem}.npz"

    def _sweep(self, stem: str, option: str, factors: str) -> list[Drawn]:
        network = "unconditional" if stem == "unconditional" else "conditional"
        said = "classifier, scale" if option == "scale" else "classifier-free,"
        return [
            Drawn(self.samples(f"{stem}-{option}{f}"), network, f"{said} {f}", _STEPS, float(f))
            for f in factors.split(",")
        ]

    def _data(self) -> Iterator[Step]:
        out, photos = self.out, self.out / "photos"
        judge, lite = out / "judge.pt2", out / "lite0.pt2"
        yield _step(
            "pack digits", f"data.pack digits {out}/digits --size 8", _packed(out / "digits")
        )
        yield _step("a classifier for features", f"bench.features digits {judge}", judge)
        yield _step("ImageNet features", f"bench.features imagenet {lite} --side 16", lite)
        make = f"bench.photos {photos} --images {_PHOTOS} --classes 2 --longest 64"
        last = photos / "n01441773" / f"n01441773_{_PHOTOS // 2 - 1}.JPEG"
        yield _step("photographs", make, last)
        for side in (8, 16):
            packed = out / f"photos{side}"
            command = f"data.pack {photos} {packed} --size {side}"
            yield _step(f"pack photographs at {side} px", command, _packed(packed))
        for name, network in (("digits", judge), ("photos16", lite)):
            made = self._reference(name)
            command = f"trainer.evaluate reference {out}/{name} --out {made} --network {network}"
            yield _step(f"reference of {name}", command, made)

    def _reference(self, shards: str) -> Path:
        return self.out / f"{shards}-reference.npz"

    def _trainings(self) -> Iterator[Step]:
        step = self._training
        yield step("classifier", "digits", preset="digits_classifier", cost=100)
        yield step("digits", "digits", *_SMALL, *_LONG, cost=200)
        two = (*_SMALL, "model.num_classes = 2")
        yield step("photos8", "photos8", *two, "training.images = 76_800", cost=120)
        large = ("model.image_size = 16", "model.attention = [8]", "training.images = 51_200")
        yield step("upsampler", "photos16", *two, *large, "model.small_size = 8", cost=300)
        yield step("photos16", "photos16", *two, *large, cost=300)
        runs = self.out / "ablation"
        command = f"trainer.ablate {self.out}/ablation.toml --runs {runs}"
        yield Step("ablation", tuple(command.split()), runs / "table.md", cost=500)

    def _training(
        self,
        run: str,
        shards: str,
        *changes: str,
        preset: str = "digits",
        cost: float = 60,
    ) -> Step:
        made = self.out / "runs" / run
        changes = (f'data.shards = "{self.out}/{shards}"', *changes)
        words = [word for change in changes for word in ("--set", change)]
        return Step(
            f"train {run}", ("trainer.train", preset, "--run", str(made), *words), made, cost
        )

    def _drawings(self) -> Iterator[Step]:
        runs = self.out / "runs"
        net, guided = f"{runs}/digits", f"--classifier {runs}/classifier --scale"
        yield self._drawing("conditional", net, f"{guided} {_SCALES}", cost=100)
        words = f"--cfg 0 {guided} {_UNCONDITIONAL_SCALES}"
        yield self._drawing("unconditional", net, words, cost=80)
        yield self._drawing("free", net, f"--cfg {_FACTORS}", cost=80)
        words = f"{guided} {_COMPARED}"
        yield self._drawing(_ANCESTRAL, net, words, steps=_ANCESTRAL, cost=250)
        yield self._drawing("one-stage", f"{runs}/photos16", "", cost=60)
        up = f"{runs}/upsampler"
        yield self._drawing("two-stages", f"{runs}/photos8", f"--upsampler {up}", cost=80)
        yield self._drawing("enlarged", up, f"--low-res {self.out}/photos16", cost=60)
        made = self.samples("bilinear")
        command = f"bench.bilinear {self.out}/photos16 {made} --images {self.images}"
        yield _step("enlarge bilinearly", command, made)

    def _drawing(
        self, stem: str, source: str, words: str, *, steps: str = _STEPS, cost: float
    ) -> Step:
        """One command, which is done when the last of its files is there."""
        files = [each.path for each in [*self.digits(), *self.photos()]]
        made = [path for path in files if path.stem.startswith(stem)][-1]
        how = f"--images {self.images} --batch 50 --steps {steps} {words}"
        command = f"trainer.sample {source} --out {self.samples(stem)} {how}"
        return Step(f"draw {stem}", tuple(command.split()), made, cost)

    def _evaluations(self) -> Iterator[Step]:
        """One command for each sweep, with its figure, and one for each of the other sets."""
        for stem in ("conditional", "unconditional", "free"):
            sweep = [each for each in self.digits() if each.path.stem.startswith(stem)]
            plot = self.out / f"{stem}.png"
            yield self._evaluation(stem, sweep, f"--plot {plot}", made=plot)
        ancestral = [each for each in self.digits() if each.factor is None]
        yield self._evaluation(_ANCESTRAL, ancestral, made=ancestral[-1].figures)
        photos = self.photos()
        yield self._evaluation("photographs", photos, made=photos[-1].figures)

    def _evaluation(self, name: str, drawn: list[Drawn], words: str = "", *, made: Path) -> Step:
        set_name, network = ("photos16", "lite0") if name == "photographs" else ("digits", "judge")
        paths = " ".join(str(each.path) for each in drawn)
        against = f"--reference {self._reference(set_name)} --network {self.out}/{network}.pt2"
        return _step(f"evaluate {name}", f"trainer.evaluate {paths} {against} {words}", made)


def _step(name: str, command: str, made: Path) -> Step:
    """A short one, in one process."""
    return Step(name, tuple(command.split()), made, cost=8, on_ranks=False)


def _packed(shards: Path) -> Path:
    return shards / "manifest.json"
