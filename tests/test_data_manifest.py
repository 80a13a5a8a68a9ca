"""A manifest that is hostile or damaged is one clear error, and nothing is written for it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.dataset import Shards, open_shards
from data.exits import REFUSED
from data.index import INDEX_DTYPE
from data.manifest import manifest_text, parse_manifest
from data.npz import npy
from data.packing.indexing import index_directory
from data.shards import main as shards_main
from tests.support.data_fixtures import image_file, pack_folder, write_shards
from tests.support.data_server import serving
from tests.support.data_streams import epoch

SIZE = 16
IMAGES = 60


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    pictures = [image_file(i, width=SIZE, height=SIZE, kind="PNG") for i in range(IMAGES)]
    (tmp_path / "site").mkdir()
    return write_shards(tmp_path / "site", stored=[pictures[:30], pictures[30:]], image_size=SIZE)


def rewrite(shards: Shards, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it the fingerprint of its new content."""
    path = Path(shards.root) / "manifest.json"
    body = json.loads(path.read_text())
    del body["fingerprint"]
    change(body)
    fingerprint = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**body, "fingerprint": fingerprint}))


def replace_index(shards: Shards, number: int, content: bytes) -> None:
    """Another index, with its checksum in the manifest."""
    (Path(shards.root) / f"{number}.idx.npy").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    rewrite(shards, lambda body: body["shards"][number].update(index_sha256=digest))


@pytest.mark.parametrize("name", ["../escaped", "../../escaped", "/{tmp}/escaped"])
def test_reading_a_hostile_dataset_writes_nothing_outside_the_cache(
    shards: Shards, tmp_path: Path, name: str
) -> None:
    name = name.replace("/{tmp}", str(tmp_path))
    rewrite(shards, lambda body: body["shards"][0].update(name=name))
    pipe = f"pipe:cat {shards.root}/$(echo {{name}} | sed 's/.*escaped/0/')"  # which has them all
    with pytest.raises(
        ValueError, match=r"manifest\.json: shards\[0\]: name = '.*: must be letters"
    ):
        epoch(pipe, cache=str(tmp_path / "node" / "cache"))
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize("name", ["..", ".hidden", "", "a b", "-rf", "a/b", "a\\b", "a\n", "é", 7])
def test_a_name_that_no_shard_may_have_is_refused(shards: Shards, name: object) -> None:
    rewrite(shards, lambda body: body["shards"][1].update(name=name))
    with pytest.raises(
        ValueError, match=r"manifest\.json: shards\[1\]: name = .*: must be letters"
    ):
        open_shards(shards.root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.pop("shards"), r"shards = None: must be a list"),
        (lambda body: body.update(shards={}), r"shards = \{\}: must be a list"),
        (lambda body: body["shards"].append("2"), r"shards\[2\]: '2': must have the keys"),
        (lambda body: body["shards"][1].pop("bytes"), r"shards\[1\]: .*: must have the keys"),
        (lambda body: body["shards"][1].update(more=1), r"shards\[1\]: .*: must have the keys"),
        (lambda body: body["shards"][1].update(bytes=-1), r"shards\[1\]: bytes = -1: must be"),
        (lambda body: body["shards"][1].update(bytes=2**70), r"shards\[1\]: bytes = \d+: must be"),
        (lambda body: body["shards"][1].update(bytes="9"), r"shards\[1\]: bytes = '9': must be"),
        (lambda body: body["shards"][1].update(samples=10**9), r"samples = 1000000000: must be"),
        (lambda body: body["shards"][1].update(samples=-1), r"shards\[1\]: samples = -1: must be"),
        (lambda body: body["shards"][1].update(samples=3.0), r"samples = 3\.0: must be"),
        (lambda body: body["shards"][1].update(samples=None), r"samples = None: must be"),
        (lambda body: body["shards"][1].update(name="0"), r"shards\[1\]: name = '0': an earlier"),
        (lambda body: body["shards"][1].update(sha256="0" * 63), r"sha256 = '0+': must be 64 hex"),
        (lambda body: body["shards"][1].update(index_sha256=[]), r"index_sha256 = \[\]: must be"),
        (lambda body: body.pop("classes"), r"classes = None: must be a list"),
        (lambda body: body.update(classes=[1]), r"classes = \[1\]: must be a list"),
        (lambda body: body.update(classes=[]), r"classes = \[\]: must be a list"),
        (lambda body: body.update(image_size="16"), r"image_size = '16': must be at least 1"),
        (lambda body: body.update(image_size=0), r"image_size = 0: must be at least 1"),
    ],
)
def test_opening_a_damaged_manifest_names_the_entry(
    shards: Shards,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    rewrite(shards, change)
    with pytest.raises(ValueError, match=rf"site/manifest\.json: .*{message}") as raised:
        open_shards(shards.root)
    assert len(str(raised.value).splitlines()) == 1
    assert shards_main(["verify", shards.root]) == REFUSED
    assert capsys.readouterr().err == f"error: {raised.value}\n"


def test_a_fingerprint_that_names_a_directory_is_refused(shards: Shards) -> None:
    path = Path(shards.root) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": "../../elsewhere"}))
    with pytest.raises(ValueError, match="was altered"):
        open_shards(shards.root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.zeros(29, INDEX_DTYPE)), "has 29 rows, the manifest says 30"),
        (npy(np.zeros(30)), "has 30 rows of another kind"),
        (b"PK\x03\x04", "is damaged"),
    ],
)
def test_an_index_that_is_another_array_is_one_error(
    shards: Shards, content: bytes, message: str
) -> None:
    """Also where it comes over a network and has the manifest's checksum."""
    replace_index(shards, 1, content)
    with pytest.raises(ValueError, match=rf"1\.idx\.npy {message}"):
        open_shards(shards.root)
    with (
        serving(Path(shards.root)) as url,
        pytest.raises(ValueError, match=rf"1\.idx\.npy {message}"),
    ):
        epoch(url)


@pytest.mark.parametrize("label", [2, -1])
def test_a_label_that_is_no_class_is_refused_as_the_index_is_first_opened(
    shards: Shards, capsys: pytest.CaptureFixture[str], label: int
) -> None:
    """As releases before 0.2 packed parquet whose metadata has too few names."""
    for number, labels in enumerate((np.arange(30) % 2, np.where(np.arange(30) == 7, label, 1))):
        index = np.load(Path(shards.root) / f"{number}.idx.npy")
        index["label"] = labels
        replace_index(shards, number, npy(index))
    rewrite(shards, lambda body: body.update(classes=["cat", "dog"]))
    message = f"1.tar: key37 has the label {label}, and manifest.json names 2 classes: pack it"
    with pytest.raises(ValueError, match=message):
        open_shards(shards.root)
    with serving(Path(shards.root)) as url:
        for command in (["info"], ["verify", "--full"]):
            for root in (shards.root, url):
                assert shards_main([*command, root]) == REFUSED
                assert message in capsys.readouterr().err
        with pytest.raises(ValueError, match=message):
            epoch(url)


@pytest.mark.parametrize("name", ["train {00}", ".hidden", "a+b", "-x"])
def test_indexing_a_tar_with_a_name_that_no_shard_may_have_asks_to_rename_it(
    shards: Shards, name: str
) -> None:
    root = Path(shards.root)
    (root / "manifest.json").unlink()
    (root / "0.tar").rename(root / f"{name}.tar")
    before = sorted(root.iterdir())
    with pytest.raises(ValueError, match=r"\.tar: name = .*: must be letters.*; rename it"):
        index_directory(root)
    assert sorted(root.iterdir()) == before


RELEASED = """{
 "format": "adm-shards-1",
 "image_size": null,
 "classes": [
  "0",
  "1"
 ],
 "shards": [
  {
   "name": "other-000",
   "samples": 2,
   "bytes": 10240,
   "sha256": "28f9a1b8be6dbd5f9ab2e0d3b1a9e7d8a2b4d53ae34f1ad9ba2f9e2e0c1d8f67",
   "index_sha256": "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
  }
 ],
 "made_by": {
  "index": "tars made by others"
 },
 "fingerprint": "a0f404351c11cfcee4487dcca9783eb1411374e08f796a02806be4cc6e253f4f"
}
"""


def test_manifests_of_the_last_release_keep_opening_with_their_fingerprints() -> None:
    opened = parse_manifest("manifest.json", RELEASED.encode())
    assert opened.fingerprint.startswith("a0f404351c11cfce")
    made_by = {"index": "tars made by others"}
    again = manifest_text(
        opened.shards, classes=opened.classes, image_size=opened.image_size, made_by=made_by
    )
    assert again == RELEASED


def test_only_the_ranks_that_are_told_to_look_at_the_files(tmp_path: Path) -> None:
    root = Path(pack_folder(tmp_path, images=20).root)
    (root / "00001.tar").unlink()
    with pytest.raises(ValueError, match=r"00001\.tar is missing"):
        open_shards(root)
    assert open_shards(root, check_files=False).count == 20
