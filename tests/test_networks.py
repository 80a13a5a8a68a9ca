"""Which classifiers guide which networks, what counts as weights, whose .pt; nets without label."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.support import golden, ranks
from trainer import export, sample, weights
from trainer.adm.config import NO_LABEL
from trainer.adm.unet import build
from trainer.config import experiment as configs
from trainer.networks import TrainedNetwork
from trainer.sampling.fit import check_enlarges, check_guides
from trainer.sampling.inputs import SampleInputs
from trainer.sampling.output import begun


def network(preset: str) -> TrainedNetwork:
    return TrainedNetwork(configs.load(preset), Path(), "", preset)


@pytest.mark.parametrize(
    ("base", "classifier"),
    [
        ("imagenet64", "classifier64"),
        ("imagenet128", "classifier128"),
        ("imagenet128_ablation", "classifier128"),
        ("imagenet256", "classifier256"),
        ("imagenet256_uncond", "classifier256"),
        ("upsample64_256", "classifier256"),
        ("imagenet512", "classifier512"),
        ("upsample128_512", "classifier512"),
        ("digits", "digits_classifier"),
    ],
)
def test_the_presets_of_a_published_pair_fit(base: str, classifier: str) -> None:
    check_guides(network(classifier), network=network(base))


def test_an_upsampler_fits_what_a_base_draws() -> None:
    for upsampler, base in (("upsample64_256", "imagenet64"), ("upsample128_512", "imagenet128")):
        check_enlarges(network(upsampler), base=network(base), classes=1000)
    for upsampler, base, classes, message in (
        ("upsample128_512", "imagenet64", 1000, "enlarges 128 px, and imagenet64 draws 64 px"),
        ("upsample64_256", "imagenet64", None, "has 1000 classes, and imagenet64 is drawn in none"),
        ("imagenet256", "imagenet64", 1000, "is no upsampler"),
        ("classifier256", "imagenet64", 1000, "is no upsampler"),
    ):
        with pytest.raises(ValueError, match=message):
            check_enlarges(network(upsampler), base=network(base), classes=classes)


def test_of_a_checkpoint_weights_and_the_config_of_its_run_are_found(
    tmp_path: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = [str(tiny), "--run", str(tmp_path / "run"), "--set"]
    runs = [["train", *run, f"training.images = {images}"] for images in (8, 16)]
    ranks.start(tmp_path / "job", ranks=1, runs=runs).wait()
    checkpoint = tmp_path / "run" / "checkpoints" / "000000000008"
    # The newest, unless images are half drawn of another.
    words = [str(tmp_path / "run"), "--images", "2", "--out"]
    sources = [TrainedNetwork.find(checkpoint, preset=None, decay=None).sha256]
    record = json.dumps({"sources": sources})
    images = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "c-base.npz", arr_0=images, request=np.array(record))  # enlarged then
    for out, parts, name in (
        ("a.npz", "b", "000000000016"),
        ("a.npz", "a-scale1e-05-cfg-1-base", checkpoint.name),
        ("a/", "a", checkpoint.name),
        ("c.npz", "c", checkpoint.name),
    ):
        request = tmp_path / f"{parts}.parts" / "request.json"
        request.parent.mkdir()
        request.write_text(
            json.dumps({"sources": ["of the upsampler"]}) if out[0] == "c" else record
        )
        arguments = sample.parser().parse_args([*words, str(tmp_path / out)])
        found = SampleInputs.find(arguments, begun=begun(arguments.out))
        assert found.denoiser.file.parent.name == name
        said = f"goes on with {checkpoint}, of which images are drawn already"
        assert (said in capsys.readouterr().err) == (name == checkpoint.name)
    for kind in ("adam-m", "adam-v"):
        renamed = tmp_path / f"weights-{kind}.safetensors"
        renamed.write_bytes((checkpoint / f"{kind}.safetensors").read_bytes())
        with pytest.raises(ValueError, match=f"holds {kind}, a state of the optimizer"):
            weights.load(renamed)
    names = weights.load(checkpoint / "ema-0.5.safetensors")
    assert names.keys() == weights.load(checkpoint / "model.safetensors").keys()
    # As version 0.1 wrote it.
    save_file(names, tmp_path / "adam-m.safetensors", metadata={"images": "8"})
    with pytest.raises(ValueError, match="holds adam-m"):
        weights.load(tmp_path / "adam-m.safetensors")
    # A checkpoint's config is that of its run: through a link, from within, on another disk.
    (tmp_path / "best").symlink_to(checkpoint)
    monkeypatch.chdir(checkpoint.parent)
    config = configs.load(tmp_path / "run" / "config.toml")
    for place in (tmp_path / "best", Path(checkpoint.name)):
        assert TrainedNetwork.find(place, preset=None, decay=None).config == config
    checkpoint.parent.rename(tmp_path / "disk")
    checkpoint.parent.symlink_to(tmp_path / "disk")
    assert TrainedNetwork.find(checkpoint, preset=None, decay=None).config == config
    with pytest.raises(ValueError, match=r"there is no .*config\.toml: add --preset"):
        TrainedNetwork.find(tmp_path / "disk" / checkpoint.name, preset=None, decay=None)


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    file, tensors = tmp_path / "a.safetensors", {"b": torch.arange(3.0), "a": torch.ones(2)}
    said = {f"key {n}": f'größe = "{n}\\"\n\t\x00\x1f\x7f\u2028\U0001f600' for n in range(6)}
    for metadata in ({"kind": "model"}, said):
        written = set()
        for _ in range(3):
            weights.save(file, tensors, metadata=metadata)
            written.add(file.read_bytes())
        assert len(written) == 1
        assert weights.metadata(file) == metadata
        assert all(value.equal(tensors[name]) for name, value in weights.load(file).items())


def test_without_its_label_an_image_gets_the_embedding_of_its_timestep_alone(tiny: Path) -> None:
    net = build(configs.load(tiny).model)
    golden.set_formula_weights(net)
    x, t = golden.wave("x", (3, 3, 8, 8), 1.0), torch.tensor([5, 5, 900])
    told, free = torch.tensor([3, 7, 3]), torch.tensor([3, NO_LABEL, NO_LABEL])
    with torch.no_grad():
        mixed = net(x, t, free)
        torch.testing.assert_close(mixed[:1], net(x, t, told)[:1])
        assert not torch.allclose(mixed[1:], net(x, t, told)[1:])
        net.label_emb.weight.zero_()
        torch.testing.assert_close(mixed[1:], net(x, t, told)[1:])
        with pytest.raises(IndexError):  # a wrong label is not another class
            net(x, t, torch.tensor([3, NO_LABEL - 1, 3]))


@pytest.mark.parametrize(
    ("objective", "classes", "said"),
    [
        ("denoise", 10, "before it loads this file, write NUM_CLASSES = 10 in its"),
        ("classify", 10, "NUM_CLASSES = 10 and, in create_classifier, out_channels=10 in its"),
        ("denoise", 1000, None),
        ("denoise", None, None),
    ],
)
def test_a_pt_of_other_classes_than_guided_diffusions_says_what_to_write_there(
    tmp_path: Path,
    tiny: Path,
    capsys: pytest.CaptureFixture[str],
    objective: str,
    classes: int | None,
    said: str | None,
) -> None:
    """Its code has the number of classes, and would name sizes of tensors."""
    text = tiny.read_text().replace("denoise", objective)
    preset = tmp_path / "mine.toml"
    preset.write_text(
        text.replace("num_classes = 10", f"num_classes = {classes}" if classes else "")
    )
    torch.save(build(configs.load(preset).model).state_dict(), tmp_path / "a.pt")
    words = [str(tmp_path / "a.pt"), "--preset", str(preset), "--to"]
    assert export.main([*words, str(tmp_path / "b.safetensors")]) == 0
    assert "guided-diffusion" not in capsys.readouterr().out
    assert export.main([*words, str(tmp_path / "b.pt")]) == 0
    out = capsys.readouterr().out
    assert (said in out) if said else ("guided-diffusion" not in out)
