"""The paper's comparisons on digits: every command is one that its program takes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import paper_results
from bench.paper_plan import Plan, Step
from data.packing import options as packing
from tests.support import options
from trainer import ablate, evaluate, sample, train
from trainer.config import experiment as configs


def take_training(words: list[str]) -> None:
    arguments = train.parser().parse_args(words)
    config = configs.load(arguments.preset, arguments.set, unset=arguments.unset)
    assert config.training.micro_batch_on(2) == 32


def take_sampling(words: list[str]) -> None:
    sample.check_options(sample.parser().parse_args(words))


def take_evaluation(words: list[str]) -> None:
    makes = words[0] == "reference"
    parser = evaluate.reference_parser() if makes else evaluate.parser()
    parser.parse_args(words[makes:])


TAKE: dict[str, Callable[[list[str]], object]] = {
    "data.pack": packing.parser().parse_args,
    "trainer.train": take_training,
    "trainer.sample": take_sampling,
    "trainer.evaluate": take_evaluation,
}


def test_every_command_is_taken_and_makes_what_others_need(tmp_path: Path) -> None:
    plan = Plan(tmp_path, 100)
    (tmp_path / "ablation.toml").write_text(plan.ablation)
    assert len(ablate.load(f"{tmp_path}/ablation.toml", (), unset=()).rows) == 6
    made: set[Path] = {tmp_path / "ablation.toml"}
    made |= {each.path for each in [*plan.digits(), *plan.photos()]}
    for step in plan.steps():
        assert not step.is_done
        module, words = step.command[0], list(step.command[1:])
        TAKE.get(module, partial(options.parse, module))(words)
        own = {step.made, *step.made.parents}
        named = {Path(word) for word in step.command if word.startswith(str(tmp_path))}
        outputs = {Path(step.command[i + 1]) for i, w in enumerate(step.command) if w == "--out"}
        assert named <= made | own | outputs, step.name
        made |= own


def test_every_sample_file_is_evaluated_once(tmp_path: Path) -> None:
    plan = Plan(tmp_path, 100)
    steps = plan.steps()
    assert len({step.made for step in steps}) == len(steps)
    evaluated = [
        Path(word)
        for step in steps
        if step.command[0] == "trainer.evaluate"
        for word in step.command
        if Path(word).parent == tmp_path / "samples"
    ]
    assert sorted(evaluated) == sorted(each.path for each in [*plan.digits(), *plan.photos()])


def test_what_is_made_is_not_made_again(tmp_path: Path) -> None:
    file = Step("file", ("x",), tmp_path / "a.npz", 1)
    whole = Step("table", ("x",), tmp_path / "table.md", 1)
    for step, text in ((file, ""), (whole, "| a | 1 |")):
        assert not step.is_done
        step.made.write_text(text)
        assert step.is_done
    whole.made.write_text("| a | not done yet |")
    assert not whole.is_done


def test_the_table_has_all_rows(tmp_path: Path) -> None:
    figure = {"value": 0.5, "error": 0.01}
    rows = [
        {
            "file": each.path.stem,
            "network": each.network,
            "guidance": each.guidance,
            "steps": each.steps,
            "factor": each.factor,
            "images": 100,
            "recognised": 0.9,
            **dict.fromkeys(("fid", "precision", "recall", "kid"), figure),
        }
        for each in Plan(tmp_path, 100).digits()
    ]
    text = paper_results.table(rows)
    assert len(text.splitlines()) == len(rows) + 2
    assert "| conditional | classifier, scale 0.5 | ddim25 | 90.0% | 0.5 ± 0.01 |" in text
