"""A short form of `make chaos`."""

from pathlib import Path

import pytest

from tests.support.chaos import EVENTS, LAUNCHER, Chaos
from tests.support.runs import Place

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Chaos:
    # All kinds but those that wait for the watchdog or for torchrun.
    kinds = tuple(kind for kind in EVENTS if kind not in ("a stopped rank", LAUNCHER))
    found = Chaos(Place(tmp_path_factory.mktemp("chaos"), tiny), events=len(kinds))
    found.disturb(kinds)
    found.calm()
    return found


def test_a_run_that_is_killed_and_damaged_is_the_calm_one_bit_for_bit(chaos: Chaos) -> None:
    chaos.check()


def test_a_segment_on_other_ranks_agrees(chaos: Chaos) -> None:
    assert chaos.segments(1) < 1e-5
