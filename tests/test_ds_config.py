"""ds_config.json: what the preset owns, what would train something else, what nobody reads."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from trainer import options, plan
from trainer.config import ds_config as ds_configs
from trainer.config import experiment as configs


def test_keys_of_the_deepspeed_config_that_the_preset_owns_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(
        json.dumps(
            {
                "train_batch_size": 4,
                "fp16": {"enabled": True},
                "optimizer": {},
                "zero_optimization": {"stage": 2},
            }
        )
    )
    with pytest.raises(ValueError, match=r"train_batch_size, fp16\.enabled, optimizer, which the"):
        ds_configs.load(file)
    file.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    with pytest.raises(ValueError, match="stage = 0: must be 1, 2 or 3"):
        ds_configs.load(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="cannot read the DeepSpeed config"):
        ds_configs.load(file)


def test_the_mark_of_windows_is_taken_as_in_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "ds_config.json"
    file.write_text(ds_configs.OWN.read_text(), encoding="utf-8-sig")
    assert ds_configs.load(file) == ds_configs.load(ds_configs.OWN)


def test_what_differs_from_a_runs_file_is_named_but_for_what_the_preset_decides(
    tmp_path: Path,
) -> None:
    """Of the file only another ZeRO stage showed in the log."""
    file, own = tmp_path / "ds_config.json", ds_configs.load(ds_configs.OWN)
    fp16, bf16 = (
        configs.load("digits", [f'training.precision = "{name}"', f"training.clip = {clip}"])
        for name, clip in (("fp16", 0.5), ("bf16", 2.0))
    )
    file.write_text(json.dumps(ds_configs.resolve(own, config=fp16, ranks=2)))
    assert ds_configs.changes(file, ds_configs.resolve(own, config=bf16, ranks=4)) == {}
    own["fp16"]["loss_scale_window"] = 7
    del own["zero_optimization"]["reduce_bucket_size"]
    own["wall_clock_breakdown"] = {"a": 1}
    assert ds_configs.changes(file, ds_configs.resolve(own, config=fp16, ranks=2)) == {
        "ds_config.fp16.loss_scale_window": (1000, 7),
        "ds_config.zero_optimization.reduce_bucket_size": (50_000_000, None),
        "ds_config.wall_clock_breakdown": (False, None),
        "ds_config.wall_clock_breakdown.a": (None, 1),
    }
    for damaged in ("{", "[]", "\x00"):  # no start needs it
        file.write_text(damaged)
        assert ds_configs.changes(file, own) == {}
    file.unlink()
    assert ds_configs.changes(file, own) == {}


def test_without_a_name_it_is_that_of_the_working_directory_or_else_the_checkouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = json.loads(Path("ds_config.json").read_text())
    monkeypatch.chdir(tmp_path)
    for command, words in ((options.parser(), ["--run", "r"]), (plan.parser(), ["--gpus", "1"])):
        assert ds_configs.load(command.parse_args(["digits", *words]).ds_config) == own
    with pytest.raises(ValueError, match=r"DeepSpeed config: no.json; leave --ds-config out for"):
        ds_configs.load("no.json")
    changed = {**own, "wall_clock_breakdown": True}
    Path("ds_config.json").write_text(json.dumps(changed))
    assert ds_configs.load(None) == changed
    monkeypatch.chdir("/")
    monkeypatch.setattr(ds_configs, "OWN", tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"config: .*none.json; name one by --ds-config$"):
        ds_configs.load(None)


@pytest.mark.parametrize(
    ("section", "setting"),
    [
        ("zero_optimization", "round_robin_gradients"),
        ("bf16", "bf16_master_weights_and_grads"),
        ("bf16", "bf16_optimizer_states"),
        ("fp16", "fp16_master_weights_and_grads"),
        ("torch_autocast", "enabled"),
        ("autotuning", "enabled"),
        ("compile", "deepcompile"),
        ("data_efficiency", "enabled"),
        ("hybrid_engine", "enabled"),
        ("zero_optimization", "zenflow"),
        ("zero_optimization", "legacy_stage1"),
        ("bf16", "check_grad_overflow"),
        ("zero_optimization", "compute_grad_norm"),
    ],
)
def test_deepspeed_settings_that_would_train_something_else_are_refused(
    tmp_path: Path, section: str, setting: str
) -> None:
    needed = f"{section}.{setting}" in ds_configs._NEEDED
    ds_config = json.loads(Path("ds_config.json").read_text())
    ds_config.setdefault(section, {})[setting] = not needed
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(ds_config))
    expected = "False: must be true, or absent: " if needed else "True: must be absent: "
    with pytest.raises(ValueError, match=rf"{section}\.{setting} = {expected}"):
        ds_configs.load(file)


def test_an_optimizer_of_deepspeeds_own_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    offload = {"device": "cpu", "super_offload": True}
    zero = {"stage": 3, "offload_optimizer": offload}
    file.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(ValueError, match=r"super_offload = True: .* keeps no averages"):
        ds_configs.load(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"prescale_gradient": true', r"no setting 'prescale_gradient' .nearest: 'prescale_grad"),
        ('"zero_optimizaton": {"stage": 3}', "no setting 'zero_optimizaton' .nearest: 'zero_opt"),
        ('"zero_optimization": {"stage": 3}', "'zero_optimization' is there twice"),
        ('"activation_checkpointing": {"cpu_checkpointing": true}', "model.checkpoint decides"),
        ('"amp": {"enabled": false}', "DeepSpeed has no setting 'amp'"),
        ('"wandb": {"enabled": true}', "board.wandb of the preset shows the run there"),
        ('"sequence_parallel_size": 2', "each rank computes whole images"),
        ('"tensor_parallel": {"autotp_size": 2}', "each rank computes with whole weights"),
        ('"gradient_allreduce_op": "sum"', 'must be "mean", or absent: the gradient'),
        ('"managed_gradient_accumulation": false', "= False: must be true, or absent: a step is"),
    ],
)
def test_what_deepspeed_would_leave_unused_in_silence_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(Path("ds_config.json").read_text().rstrip().removesuffix("}") + f", {text}}}")
    with pytest.raises(ValueError, match=message):
        ds_configs.load(file)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"overlap_com": True}, "setting 'zero_optimization.overlap_com' .nearest: 'overlap_comm'"),
        ({"reduce_bucket_size": "5e8"}, "reduce_bucket_size = '5e8': must be a number of at least"),
        ({"offload_optimizer": {"device": "nvme"}}, "'nvme': must be one of none, cpu"),
        ({"offload_param": "cpu"}, 'offload_param = .cpu.: must be {"device": "cpu"}'),
        (True, r"zero_optimization = True: must be a table, as in \{\.\.\.\}"),
    ],
)
def test_what_a_plan_cannot_count_with_and_deepspeed_refuses_is_refused(
    tmp_path: Path, zero: object, message: str
) -> None:
    file = tmp_path / "ds.json"
    section = {"stage": 3, **zero} if isinstance(zero, dict) else zero
    file.write_text(json.dumps({"zero_optimization": section}))
    with pytest.raises(ValueError, match=message):
        ds_configs.load(file)


def test_what_is_null_is_absent_and_every_known_name_is_deepspeeds(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    zero = {"stage": 3, "overlap_comm": None}
    given = {"zero_optimization": zero, "bf16": None, "activation_checkpointing": None}
    file.write_text(json.dumps({**given, "gradient_allreduce_op": "mean"}))
    found = ds_configs.load(file)
    assert found == {"zero_optimization": {"stage": 3}, "gradient_allreduce_op": "mean"}
    config = configs.load("digits", ['training.precision = "fp32"'])
    DeepSpeedConfig(ds_configs.resolve(found, config=config, ranks=1))
    names = {name.removeprefix("stage3_") for name in DeepSpeedZeroConfig.model_fields}
    assert names == ds_configs._ZERO


def test_older_names_are_counted_with_as_deepspeed_takes_them(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    older = {"cpu_offload": True, "cpu_offload_param": False, "param_persistence_threshold": 10}
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, **older}}))
    zero = ds_configs.load(file)["zero_optimization"]
    asked, taken = (DeepSpeedZeroConfig(**given) for given in ({"stage": 3, **older}, zero))
    assert zero["offload_optimizer"]["device"] == asked.offload_optimizer.device == "cpu"
    assert "offload_param" not in zero and asked.offload_param is None
    name = "param_persistence_threshold"
    assert zero[f"stage3_{name}"] == getattr(taken, name) == getattr(asked, name) == 10


class Asked(dict):
    """A table that remembers which keys it was asked for."""

    keys_asked: ClassVar[set[str]] = set()

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> object:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: object = None) -> object:
        self.keys_asked.add(key)
        return super().get(key, default)

    def keys(self) -> "Asked":  # type: ignore[override]
        return self

    def __copy__(self) -> "Asked":
        return self


def test_every_key_that_deepspeed_reads_is_known() -> None:
    owned = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
    DeepSpeedConfig(Asked(owned))
    assert len(Asked.keys_asked) > 50
    assert Asked.keys_asked - ds_configs._KNOWN == set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)


def test_every_auto_is_filled_from_the_preset() -> None:
    config = configs.load("digits")
    resolved = ds_configs.resolve(ds_configs.load("ds_config.json"), config=config, ranks=2)
    assert "auto" not in json.dumps(resolved)
    bare = ds_configs.resolve({"zero_optimization": {"stage": 2}}, config=config, ranks=2)
    assert bare["zero_force_ds_cpu_optimizer"] is False  # or it would refuse ours beside an offload
    assert resolved["train_batch_size"] == config.training.batch
    with pytest.raises(ValueError, match=r"training\.batch = 64 does not divide among 3 ranks"):
        ds_configs.resolve(ds_configs.load("ds_config.json"), config=config, ranks=3)


def test_an_auto_that_no_preset_fills_is_deepspeeds_default(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    file.write_text(json.dumps({"zero_optimization": zero}))
    assert ds_configs.load(file)["zero_optimization"] == {"stage": 3}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_micro_batches_are_added_up_in_fp32_in_bf16(stage: int) -> None:
    raw = {"zero_optimization": {"stage": stage}}
    small = ('training.precision = "bf16"', "training.micro_batch = 16")
    for sets, is_stated in ((small, stage > 1), (small[:1], False), (small[1:], False)):
        resolved = ds_configs.resolve(raw, config=configs.load("digits", sets), ranks=1)
        expected = {"grad_accum_dtype": "fp32"} if is_stated else None
        assert resolved.get("data_types") == expected, sets
    own = raw | {"data_types": {"grad_accum_dtype": "bf16"}}
    resolved = ds_configs.resolve(own, config=configs.load("digits", small), ranks=1)
    assert resolved["data_types"] == own["data_types"]
