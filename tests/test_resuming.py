"""Each precision, ZeRO stage and offload resumes from the state of others, bit for bit."""

from pathlib import Path

import pytest

from tests.support.resuming import FEW, table, tolerance


@pytest.mark.slow
def test_every_setting_resumes_from_others(tmp_path: Path, tiny: Path) -> None:
    rows = table(tmp_path, tiny, FEW)
    assert len(rows) == len(FEW) ** 2
    pairs = {(setting[n], source[n], n) for setting, source, *_ in rows for n in range(3)}
    assert len(pairs) == 9 + 9 + 4  # of precisions, of stages, of offload
    for setting, source, exact, away in rows:
        assert exact, (setting, source)
        assert away < tolerance(setting, source), (setting, source, away)
