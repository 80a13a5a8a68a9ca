"""The page of settings is current, and says what every setting means."""

from pathlib import Path

from trainer import describe


def test_the_page_of_settings_is_current() -> None:
    page = Path("docs/settings.md").read_text()
    assert page == "\n".join(describe.page()), "python -m trainer.describe > docs/settings.md"


def test_every_setting_has_a_meaning() -> None:
    rows = [line for line in describe.page() if line.startswith("| `")]
    assert len(rows) > 70
    assert [row for row in rows if row.split("|")[-2].strip() == ""] == []
