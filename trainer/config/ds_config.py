"""DeepSpeed's settings: `ds_config.json` holds the mechanics, the preset fills what is "auto".

No DeepSpeed here: a login node checks the file before anything is queued.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data import files
from data.config import naming
from trainer.adm.config import check
from trainer.config.experiment import Config
from trainer.config.settings import differing, leaves, nearest

#: The file of the checkout.
OWN = Path(__file__).parents[2] / "ds_config.json"
#: Which file is read where none is named.
DEFAULT = "ds_config.json of the working directory if it has one, else the checkout's"

# Keys that the preset decides.
_PRESET_OWNS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
)
_NOT_HERE = ("optimizer", "scheduler")
# All that DeepSpeed 0.19 reads. What it does not know it leaves unused in silence, or refuses once
# a job runs.
_KNOWN = frozenset((
    "activation_checkpointing", "aio", "autotuning", "bf16", "bfloat16", "checkpoint", "comet",
    "comms_logger", "communication_data_type", "compile", "csv_monitor", "data_efficiency",
    "data_types", "dataloader_drop_last", "datastates_ckpt", "disable_allgather",
    "disable_python_gc", "dump_state", "expert_parallel", "flops_profiler", "fp16",
    "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping",
    "gradient_predivide_factor", "hybrid_engine", "log_level", "managed_gradient_accumulation",
    "memory_breakdown", "optimizer", "pipeline", "prescale_gradients", "scheduler",
    "seq_parallel_communication_data_type", "sequence_parallel_size", "steps_per_print",
    "tensor_parallel", "tensorboard", "timers", "torch_autocast", "train_batch_size",
    "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism", "vocabulary_size",
    "wall_clock_breakdown", "wandb", "weight_quantization", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
))  # fmt: skip
# The same of zero_optimization, where names may begin with "stage3_".
_ZERO = frozenset((
    "allgather_bucket_size", "allgather_partitions", "allgather_sequential", "compute_grad_norm",
    "contiguous_gradients", "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory",
    "elastic_checkpoint", "enable_sanity_checks", "gather_16bit_weights_on_model_save",
    "gather_fp16_weights_on_model_save", "ignore_unused_parameters", "leaf_module", "legacy_stage1",
    "load_from_fp32_weights", "log_trace_cache_warnings", "max_live_parameters",
    "max_reuse_distance", "memory_efficient_linear", "model_persistence_threshold",
    "module_granularity_threshold", "offload_optimizer", "offload_param", "overlap_comm",
    "override_module_apply", "param_persistence_threshold", "parameter_alignment",
    "pipeline_loading_checkpoint", "prefetch_bucket_size", "reduce_bucket_size", "reduce_scatter",
    "round_robin_gradients", "save_muon_momentum_buffer_in_memory", "stage", "sub_group_size",
    "use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce", "zenflow",
    "zero_hpz_partition_size", "zero_quantized_gradients", "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
))  # fmt: skip
# Those of them, all sizes, that a plan counts with.
_SIZES = "reduce_bucket_size", "stage3_max_live_parameters", "stage3_param_persistence_threshold"
# Where states can be, and weights in stage 3: DeepSpeed starts with states that are empty when they
# are to be files, and the averages have to start from them.
_DEVICES = {"offload_optimizer": ("none", "cpu"), "offload_param": ("none", "cpu", "nvme")}
# What DeepSpeed called offloading to the host's memory, and calls it now.
_OFFLOADS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
_OWN_OPTIMIZER = "its own optimizer keeps no averages of the weights"
_MASTERS = "weights, averages and moments are kept in fp32 here"
# Settings that DeepSpeed takes, and why a run under them would go wrong.
_WRONG = {
    "zero_optimization.round_robin_gradients": "DeepSpeed 0.19 then mixes up which numbers of the "
    "weights a rank holds",
    "bf16.bf16_master_weights_and_grads": _MASTERS,
    "bf16.bf16_optimizer_states": _MASTERS,
    "fp16.fp16_master_weights_and_grads": _MASTERS,
    "activation_checkpointing": "model.checkpoint decides what is computed again",
    "torch_autocast.enabled": "training.precision decides in what the network computes",
    "autotuning.enabled": "DeepSpeed ends the process after some steps; `python -m trainer.plan` "
    "says which micro-batches fit",
    "compile.deepcompile": "training.compile decides whether the network is compiled",
    "data_efficiency.enabled": "the seed alone decides which image comes when",
    "zero_force_ds_cpu_optimizer": _OWN_OPTIMIZER,
    "zero_optimization.offload_optimizer.super_offload": _OWN_OPTIMIZER,
    "zero_optimization.zenflow": _OWN_OPTIMIZER,
    "zero_optimization.legacy_stage1": "DeepSpeed 0.19 has it no more",
    "hybrid_engine.enabled": "it is for networks that generate text",
    "wandb.enabled": "board.wandb of the preset shows the run there",
    "datastates_ckpt": "checkpoints are written by the trainer",
    "sequence_parallel_size": "each rank computes whole images",
    "tensor_parallel": "each rank computes with whole weights; ZeRO divides what they take",
}
_UNCHECKED = "gradients that are not finite would enter the weights"
# Settings that may not be turned off.
_NEEDED = {
    "bf16.check_grad_overflow": _UNCHECKED,
    "zero_optimization.compute_grad_norm": _UNCHECKED,
    "managed_gradient_accumulation": "a step is made of the micro-batches that the preset says",
}


def load(path: str | Path | None) -> dict[str, Any]:
    """Read a ds_config.json; of None, `DEFAULT`.

    Raises:
        ValueError: it is missing or unreadable, has a key that DeepSpeed does not know, or sets
            what the preset owns (all such keys are named).
    """
    if path is None:
        path = here if (here := Path(OWN.name)).exists() else OWN
    path = Path(path)
    if not path.exists():
        way_out = f"leave --ds-config out for {OWN}" if OWN.exists() else "name one by --ds-config"
        raise ValueError(f"no such DeepSpeed config: {path}; {way_out}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # as a preset's
        ds_config: dict[str, Any] = json.loads(text, object_pairs_hook=_once)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read the DeepSpeed config {path}: {files.reason(error)}"
        ) from None
    if not isinstance(ds_config, dict):
        raise ValueError(f"cannot read the DeepSpeed config {path}: must be a table, as in {{...}}")
    with naming(f"{path}"):
        _check_names(ds_config)
    claimed = [name for name in _PRESET_OWNS if _lookup(ds_config, name) not in (None, "auto")]
    claimed += [name for name in _NOT_HERE if name in ds_config]
    if claimed:
        raise ValueError(
            f"{path} sets {', '.join(claimed)}, which the preset decides: "
            'write "auto" there (remove optimizer and scheduler), and set it in the preset'
        )
    with naming(f"{path}"):
        stage = _lookup(ds_config, "zero_optimization.stage")
        check(stage in (1, 2, 3), "zero_optimization.stage", stage, "1, 2 or 3")
        _name_as_now(zero := ds_config["zero_optimization"])
        _check_offload(zero)
        _check_numerics(ds_config)
    return ds_config


def _check_names(ds_config: dict[str, Any]) -> None:
    """Refuse what DeepSpeed does not know, and sections that are none."""
    for key in ds_config:
        if key not in _KNOWN:
            raise ValueError(f"DeepSpeed has no setting {key!r}{nearest(key, _KNOWN)}")
    for name in ("zero_optimization", "bf16", "fp16"):
        section = ds_config.get(name, {})
        check(isinstance(section, dict), name, section, "a table, as in {...}")
    for key in ds_config.get("zero_optimization", {}):
        if key.removeprefix("stage3_") not in _ZERO:
            name = f"zero_optimization.{key}"
            raise ValueError(f"DeepSpeed has no setting {name!r}{nearest(key, _ZERO)}")


def _check_offload(zero: dict[str, Any]) -> None:
    """Refuse places that DeepSpeed does not know, or from which the averages do not return."""
    for name, devices in _DEVICES.items():
        section = zero.get(name, {})
        setting = f"zero_optimization.{name}"
        check(isinstance(section, dict), setting, section, '{"device": "cpu"}')
        device, known = section.get("device", "none"), f"one of {', '.join(devices)}"
        check(device in devices, f"{setting}.device", device, known)


def _name_as_now(zero: dict[str, Any]) -> None:
    """Take out what is DeepSpeed's default, and call by one name what has several there."""
    # Files for transformers have more of them; DeepSpeed, too, takes its own defaults there.
    for name in [n for n, value in zero.items() if value == "auto" and n != "overlap_comm"]:
        del zero[name]
    for name in zero.keys() & {"max_live_parameters", "param_persistence_threshold"}:
        zero[f"stage3_{name}"] = zero.pop(name)
    for name in zero.keys() & _OFFLOADS.keys():
        if zero.pop(name):
            zero[_OFFLOADS[name]] = {"device": "cpu"}


def _once(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of the file, without what is null, which is absent.

    Of a key that is there twice, JSON would take the last in silence.
    """
    table = dict(entries)
    if len(table) < len(entries):
        keys = [key for key, _ in entries]
        raise ValueError(f"{next(k for k in keys if keys.count(k) > 1)!r} is there twice")
    return {key: value for key, value in table.items() if value is not None}


def _check_numerics(ds_config: dict[str, Any]) -> None:
    """Refuse the settings that a run would learn something else under, ignore, or fall over."""
    for name, why in _WRONG.items():
        value = _lookup(ds_config, name)
        check(value in (None, False), name, value, f"absent: {why}")
    for name, why in _NEEDED.items():
        check(_lookup(ds_config, name) is not False, name, False, f"true, or absent: {why}")
    for name in _SIZES:
        size = ds_config["zero_optimization"].get(name, 0)
        is_size = isinstance(size, int | float) and size >= 0
        check(is_size, f"zero_optimization.{name}", size, "a number of at least 0")
    operation = ds_config.get("gradient_allreduce_op", "mean")
    grows = "the gradient, its clipping and what counts as unusual would grow with the number of"
    mean = f'"mean", or absent: {grows} ranks'
    check(operation == "mean", "gradient_allreduce_op", operation, mean)
    floor = _lookup(ds_config, "fp16.min_loss_scale")
    is_floor = floor is None or (isinstance(floor, int) and floor >= 1)
    falls = "without a floor the loss scale of a diverged run falls forever"
    check(is_floor, "fp16.min_loss_scale", floor, f"an integer of at least 1: {falls}")


def _lookup(table: dict[str, Any], name: str) -> Any:
    head, _, rest = name.partition(".")
    value = table.get(head)
    return _lookup(value, rest) if rest and isinstance(value, dict) else value


def resolve(ds_config: dict[str, Any], *, config: Config, ranks: int) -> dict[str, Any]:
    """`ds_config` with every "auto" filled from the preset and the number of ranks."""
    training = config.training
    micro = training.micro_batch_on(ranks)
    owned = (
        training.batch,
        micro,
        training.batch // (ranks * micro),
        training.clip or 0.0,
        training.precision == "bf16",
        training.precision == "fp16",
    )
    resolved: dict[str, Any] = json.loads(json.dumps(ds_config))
    for name, value in zip(_PRESET_OWNS, owned, strict=True):
        head, _, rest = name.partition(".")
        if rest:
            resolved.setdefault(head, {})[rest] = value
        else:
            resolved[head] = value
    # DeepSpeed's timer would make the host wait for the device twice in every micro-batch.
    resolved.setdefault("timers", {"throughput": {"enabled": False}})
    # DeepSpeed has optimizers of its own for offloaded states, and refuses others unless told.
    resolved.setdefault("zero_force_ds_cpu_optimizer", False)
    zero = resolved["zero_optimization"]
    several = resolved["gradient_accumulation_steps"] > 1
    if training.precision == "bf16" and several and zero["stage"] > 1:
        # In bf16 a sum of many micro-batches loses most of each; stage 1 has no other.
        resolved.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    if zero.get("overlap_comm") == "auto":
        zero["overlap_comm"] = ranks > 1
    return resolved


def changes(file: Path, resolved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ from those in a run's file, as name -> (old, new).

    What the preset decides is left out: changes of the preset name it. Of a file that is missing or
    damaged nothing is known: what a run does next does not depend on it.
    """
    try:
        before = leaves(json.loads(file.read_text()), "ds_config")
    except (OSError, ValueError, AttributeError):
        return {}
    changed = differing(before, leaves(resolved, "ds_config"))
    owned = {f"ds_config.{name}" for name in _PRESET_OWNS}
    return {name: values for name, values in changed.items() if name not in owned}
