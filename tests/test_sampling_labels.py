"""The classes of drawn images: by number, span, name and file, in turn or at random."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.sampling.labels import Labels, choose, columns

NAMES = ["n01440764", "n01443537", "n01484850", "goldfish", "5"]
INDICES = torch.arange(10)


def labels(**given: Any) -> Labels | None:
    asked = {"rule": "balanced", "classes": None, "low_res": None, "count": 5, "enlarges": False}
    return choose(**{**asked, "names": lambda: NAMES, "seed": 0, **given})


def drawn(**given: Any) -> list[int]:
    chosen = labels(**given)
    assert chosen is not None
    return chosen.of(INDICES[:6]).tolist()


def test_classes_are_numbers_spans_names_or_a_file(tmp_path: Path) -> None:
    assert drawn() == [0, 1, 2, 3, 4, 0]
    assert drawn(classes="3,1") == [3, 1, 3, 1, 3, 1]
    assert drawn(classes="0-2, 4") == [0, 1, 2, 4, 0, 1]
    assert drawn(classes="goldfish,n01443537,2") == [3, 1, 2, 3, 1, 2]
    (tmp_path / "some.txt").write_text("goldfish\n0-1,4\n\n")
    assert drawn(classes=str(tmp_path / "some.txt")) == [3, 0, 1, 4, 3, 0]
    assert labels(count=None) is None


def test_a_number_that_is_another_class_s_name_is_refused(tmp_path: Path) -> None:
    """Folders 1, 2, 10 and 3 are packed in this order."""
    names = ["1", "10", "2", "3"]
    numbered = partial(drawn, names=lambda: names, count=4)
    assert numbered(classes="10, 3, 0")[:3] == [1, 3, 0]
    assert numbered(classes="2-2,1-1")[:2] == [2, 1]
    (tmp_path / "a.txt").write_text("10\n1\n")
    for given in ({"classes": "10,1"}, {"rule": str(tmp_path / "a.txt")}):
        with pytest.raises(
            ValueError, match=r"1 is the number of one class and the name of class 0"
        ):
            numbered(**given)
    assert drawn(classes="3,1", names=lambda: list("01234"))[:2] == [3, 1]


def test_a_name_may_have_a_comma_and_a_line_may_not_be_empty(tmp_path: Path) -> None:
    names = ["tench, Tinca tinca", "goldfish", "3"]
    assert drawn(classes="tench, Tinca tinca", names=lambda: names, count=3)[:2] == [0, 0]
    assert drawn(classes="goldfish, 2", names=lambda: names, count=3)[:2] == [1, 2]
    (tmp_path / "some.txt").write_text("goldfish\ntench, Tinca tinca\n2\n")
    assert drawn(classes=f"{tmp_path}/some.txt", names=lambda: names, count=3)[:3] == [1, 0, 2]
    (tmp_path / "labels.txt").write_text("1\n\n2\n\n")
    with pytest.raises(ValueError, match=r"labels.txt: line 2 is empty"):
        labels(rule=str(tmp_path / "labels.txt"))


def test_random_classes_depend_on_seed_and_index_alone() -> None:
    many = torch.arange(50_000)
    chosen = labels(rule="random", count=5)
    assert chosen is not None
    found = chosen.of(many)
    assert torch.equal(found[100:200], chosen.of(many[100:200]))
    counts = torch.bincount(found)
    assert counts.min() > 9_600 and counts.max() < 10_400 and counts.unique().numel() > 1
    other = labels(rule="random", count=5, seed=1)
    assert other is not None and not torch.equal(found, other.of(many))
    assert set(drawn(rule="random", classes="1,3")) <= {1, 3}


def test_labels_come_from_a_file_of_any_kind(tmp_path: Path) -> None:
    want = [4, 0, 0, 2, 1, 3]
    (tmp_path / "a.txt").write_text("4\nn01440764\n0\n2\nn01443537\ngoldfish\n")
    np.save(tmp_path / "a.npy", np.array(want, np.int32))
    np.savez(tmp_path / "a.npz", arr_0=np.zeros(1), arr_1=np.array(want))
    rules = set()
    for name in ("a.txt", "a.npy", "a.npz"):
        chosen = labels(rule=str(tmp_path / name))
        assert chosen is not None and chosen.of(INDICES[:6]).tolist() == want
        rules.add(chosen.rule)
    assert len(rules) == 1 and rules.pop().startswith("sha256:")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "has no labels; it must have one for each image"),
        ("a.npy", np.zeros(0, int), "has no labels"),
        ("a.txt", "1\n" + "9" * 20, f"a.txt: {'9' * 20} is not among the classes 0 to 4"),
        ("a.txt", "1" * 5000, "is not among the classes 0 to 4"),
        ("a.npy", np.array([0, 2**63 + 3], np.uint64), f"{2**63 + 3} is not among the classes"),
        ("a.npy", np.zeros(2), "labels are float64"),
        ("a.npz", np.zeros(2, int), "is not readable"),
    ],
)
def test_a_file_of_no_labels_is_refused_by_name(
    name: str, content: str | np.ndarray, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    else:
        with path.open("wb") as file:
            np.save(file, content)
    with pytest.raises(ValueError, match=rf"^--labels.*{message}"):
        labels(rule=str(path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"classes": "6"}, "--classes: 6 is not among the classes 0 to 4"),
        ({"classes": "-1"}, "--classes: -1 is not among"),
        ({"classes": "2-9"}, "--classes 2-9: must be a span of the classes 0 to 4"),
        ({"classes": "3-1"}, "--classes 3-1: must be a span"),
        ({"classes": "0-999999999999"}, "must be a span"),
        ({"classes": "goldfisch"}, r"'goldfisch' is not a class \(nearest: 'goldfish'\)"),
        ({"classes": "rose"}, "'rose' is not a class; the classes are n01440764, n01443537, "),
        ({"classes": " ,"}, "must name a class"),
        ({"classes": "1" * 300}, "is not among the classes"),
        ({"classes": "1", "count": None}, "--classes: the network has no classes"),
        ({"rule": "random", "count": None}, "--labels: the network has no classes"),
        ({"rule": "nothing.txt"}, "--labels nothing.txt: must be balanced, random or a file"),
        ({"enlarges": True}, "--low-res images have no labels, and the network has classes"),
        ({"low_res": np.array([1, 7])}, "--low-res: 7 is not among the classes 0 to 4"),
        ({"low_res": np.array([1, -7])}, "--low-res: -7 is not among"),
        ({"low_res": np.array([1]), "classes": "1"}, "--classes: must be absent where"),
        ({"low_res": np.array([1]), "rule": "random"}, "--labels: must be absent where"),
    ],
)
def test_what_makes_no_labels_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labels(**given)


def test_names_that_are_unknown_name_the_option_that_has_them(tmp_path: Path) -> None:
    def no_names() -> list[str]:
        raise ValueError("no dataset at shards")

    (tmp_path / "a.txt").write_text("goldfish\n")
    given = {"--classes": {"classes": "goldfish"}, "--labels": {"rule": str(tmp_path / "a.txt")}}
    for option, words in given.items():
        with pytest.raises(ValueError, match=rf"^{option}.*: no dataset at shards$"):
            labels(names=no_names, **words)


def test_a_grid_has_a_column_for_each_class_where_they_come_in_turn() -> None:
    assert columns(np.arange(100) % 10) == 10
    assert columns(np.arange(7) % 3) == 3
    for shown in (None, np.zeros(50, int), np.arange(100), np.arange(5), np.array([3])):
        assert columns(shown) is None
