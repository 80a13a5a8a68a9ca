"""The page of settings is current, and says what every setting means."""

from pathlib import Path

import pytest

from data.exits import REFUSED
from trainer.config import describe


def test_the_page_of_settings_is_current() -> None:
    page = Path("docs/settings.md").read_text()
    assert page == "\n".join(describe.page()), (
        "python -m trainer.config.describe > docs/settings.md"
    )


def test_every_setting_has_a_meaning() -> None:
    rows = [line for line in describe.page() if line.startswith("| `")]
    assert len(rows) > 70
    assert [row for row in rows if row.split("|")[-2].strip() == ""] == []


def test_its_help_is_short_and_a_wrong_word_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for word, status in (("--help", 0), ("--nosuch", REFUSED)):
        with pytest.raises(SystemExit) as ended:
            describe.main([word])
        assert ended.value.code == status
        assert len("".join(capsys.readouterr()).splitlines()) < 12
