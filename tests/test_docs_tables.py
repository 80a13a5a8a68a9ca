"""Tables of the pages say what the program does: flags, messages, modules."""

import ast
import re
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.pages import ROOT, Page
from trainer.config import experiment as configs
from trainer.config import flags

FLAGS = Page(ROOT / "docs" / "from-guided-diffusion.md")
TROUBLE = Page(ROOT / "docs" / "troubleshooting.md")

#: A network of each kind, and a value of each flag that its network does not have.
UNET = "--image_size 64 --num_head_channels 64 --learn_sigma True"
UPSAMPLER = "--large_size 256 --small_size 64"
CLASSIFIER = "--image_size 64 --classifier_depth 4"
OTHERS = {
    "image_size": "128", "large_size": "128", "small_size": "128", "num_channels": "64",
    "channel_mult": "1,1,2,2", "num_res_blocks": "5", "attention_resolutions": "8",
    "num_heads": "2",
    "num_head_channels": "32", "num_heads_upsample": "2", "dropout": "0.3", "class_cond": "True",
    "use_checkpoint": "True", "use_scale_shift_norm": "False", "resblock_updown": "True",
    "use_new_attention_order": "True", "classifier_width": "64", "classifier_depth": "3",
    "classifier_attention_resolutions": "8", "classifier_use_scale_shift_norm": "False",
    "classifier_resblock_updown": "False", "classifier_pool": "spatial", "learn_sigma": "False",
    "diffusion_steps": "4000 --rescale_timesteps False", "noise_schedule": "cosine",
    "use_kl": "True", "predict_xstart": "True", "rescale_learned_sigmas": "True", "lr": "0.5",
    "weight_decay": "0.5", "batch_size": "3", "microbatch": "1", "ema_rate": "0.5",
    "iterations": "77", "lr_anneal_steps": "77", "anneal_lr": "True",
    "schedule_sampler": "loss-second-moment", "use_fp16": "False", "classifier_use_fp16": "False",
    "log_interval": "7", "save_interval": "7",
}  # fmt: skip


def rows(page: Page, *, start: str) -> dict[str, str]:
    """The rows of two columns whose first begins so, without its backquotes."""
    found = re.findall(rf"^\| `({start}[^`|]*)` \| (.*) \|$", page.text, flags=re.M)
    return dict(found)


def test_every_flag_has_a_row() -> None:
    assert {name.removeprefix("--") for name in rows(FLAGS, start="--")} == flags.NAMES


@cache
def settings_of(text: str) -> dict[str, object]:
    table = tomllib.loads(flags.to_preset(text, ranks=8))
    return configs.flatten(configs.from_table(table))


@pytest.mark.parametrize("flag", OTHERS)
def test_a_flag_changes_the_setting_of_its_row(flag: str) -> None:
    """Another value of the flag alone changes this setting, and what is derived from it."""
    base = UNET
    if flag.startswith("classifier"):
        base = CLASSIFIER
    elif flag in ("large_size", "small_size"):
        base = UPSAMPLER
    elif flag.startswith("num_heads"):
        base = base.replace("--num_head_channels 64", "")
    before, after = settings_of(base), settings_of(f"{base} --{flag} {OTHERS[flag]}")
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    setting = rows(FLAGS, start="--")[f"--{flag}"].strip("`")
    assert setting in changed


def test_the_rows_of_other_flags_say_what_the_program_says() -> None:
    table = rows(FLAGS, start="--")
    for name, said in flags.ELSEWHERE.items():
        assert table[f"--{name}"].replace("`", "") == said


@cache
def sources() -> list[str]:
    """All texts of the program, with ... for the values in them, and those of its scripts."""
    found = [path.read_text() for path in (ROOT / "launch" / "templates").iterdir()]
    for package in ("launch", "trainer", "data"):
        for path in (ROOT / package).rglob("*.py"):
            found += texts(path)
    return found


def texts(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else "..." for v in node.values)
            yield "".join(map(str, parts))


def messages() -> list[str]:
    """The lines of the blocks of text of the page."""
    blocks = re.findall(r"^```text\n(.*?)^```", TROUBLE.text, flags=re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


def has_in_order(text: str, parts: Iterable[str]) -> bool:
    for part in parts:
        _, found, text = text.partition(part)
        if not found:
            return False
    return True


@pytest.mark.parametrize("message", messages())
def test_a_message_of_the_page_is_the_programs(message: str) -> None:
    """Values are written as `...`."""
    parts = [part for part in message.split("...") if part]
    assert any(has_in_order(text, parts) for text in sources())


def test_every_module_is_on_the_page_of_the_code() -> None:
    listed = {*re.findall(r"\w+", (ROOT / "docs" / "code.md").read_text())}
    files = [file for name in ("launch", "trainer", "data") for file in (ROOT / name).rglob("*.py")]
    assert {file.stem for file in files} - listed == {"__init__"}
