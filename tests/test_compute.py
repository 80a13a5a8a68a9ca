"""Compiled networks: the same numbers, names and checkpoints, on real ranks. Here by aot_eager."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager
from torch._functorch.aot_autograd import make_boxed_func

from tests.support import golden, ranks
from tests.support.runs import GRIDS, HALF, STEP, UNJUDGED, Place
from trainer.adm.blocks import resize
from trainer.adm.config import ClassifierConfig, UNetConfig
from trainer.adm.unet import UNet, build, example_inputs
from trainer.config import ds_config as ds_configs
from trainer.config import experiment as configs
from trainer.engine import compute

SIZES: dict[str, Any] = {
    "image_size": 4, "channels": 32, "channel_mult": (1,), "blocks": 1, "attention": (4,),
    "heads": 2, "num_classes": 5,
}  # fmt: skip
LEVELS = {
    **SIZES, "image_size": 8, "channel_mult": (1, 2, 2), "attention": (4,), "num_classes": 3,
}  # fmt: skip
SETS = (
    "model.image_size = 4", "model.channels = 32", "model.channel_mult = [1]", "model.blocks = 1",
    "model.attention = [4]", "model.dropout = 0.0", "training.batch = 8", "training.images = 8",
    "training.micro_batch = 2",
)  # fmt: skip


def filled(config: Any) -> Any:
    net = build(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return net


def inputs(images: int) -> list[Tensor]:
    x = golden.wave("x", (images, 3, 4, 4), 1.0)
    return [x, torch.arange(images) * 100, torch.arange(images) % 5]


@pytest.mark.parametrize("is_wanted", [True, False])
def test_tf32_is_set_so_that_the_compiler_can_read_it(is_wanted: bool) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        compute.use_tf32(is_wanted)
        assert torch.get_float32_matmul_precision() == ("high" if is_wanted else "highest")
        assert torch.backends.cuda.matmul.allow_tf32 == is_wanted
        assert torch.backends.cudnn.allow_tf32 == is_wanted
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_a_compiled_net_says_the_same_also_in_a_smaller_batch() -> None:
    net, said = filled(UNetConfig(**SIZES)), list[str]()
    names, whole, small = list(net.state_dict()), inputs(3), inputs(2)
    plain = net(*small)
    compute.compile_forward(net, say=said.append, backend="aot_eager")
    assert list(net.state_dict()) == names
    with torch._dynamo.config.patch(error_on_recompile=True):
        net(*whole)
        found = net(*small)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    assert len(said) == 2 and said[0].startswith("compiling") and said[1].startswith("compiled")


def test_a_compiled_guide_has_the_same_gradient_also_in_a_smaller_batch() -> None:
    net = filled(ClassifierConfig(**SIZES)).requires_grad_(False)

    def gradient(images: int) -> Tensor:
        x, t, _ = inputs(images)
        (found,) = torch.autograd.grad(net(x.requires_grad_(), t)[:, 1].sum(), x)
        return found

    plain = gradient(2)
    compute.compile_forward(net, say=lambda _: None, backend="aot_eager")
    gradient(3)
    torch.testing.assert_close(gradient(2), plain, rtol=1e-5, atol=1e-6)


def stepped(engine: Any, *, images_seen: int) -> dict[str, dict[str, Tensor]]:
    """The states after a step, by kind."""
    for micro in range(engine.accumulation):
        out = engine(*inputs(2))
        engine.backward(out.square().mean() + micro * out.mean())
    engine.step(lr=1e-2, images_seen=images_seen, **UNJUDGED)
    return {kind: engine.gather(kind) for kind in engine.kinds}


def train(directory: Path) -> int:
    """A step uncompiled and one compiled; then each goes on from the state of the other."""
    from trainer.engine.zero import Engine
    from trainer.ranks.process_group import connected
    from trainer.ranks.world import join

    world, found = join(), {}
    config = configs.load("digits", SETS)
    with connected(world, patience=ranks.LIMIT) as device:
        raw = ds_configs.load(ranks.ROOT / "ds_config.json")
        resolved = ds_configs.resolve(raw, config=config, ranks=world.size)
        engines, states = {}, {}
        for name in ("off", "on"):
            net = filled(config.model)
            if name == "on":
                compute.compile_forward(net, say=lambda _: None, backend="aot_eager")
            start = {n: p.detach().clone() for n, p in net.named_parameters()}
            given = start if world.is_main else None
            engine = Engine(net, config=config, ds_config=resolved, device=device, start=given)
            engines[name], states[name] = engine, stepped(engine, images_seen=8)
        for before, name in (("off", "on"), ("on", "off")):
            for kind, tensors in states[before].items():
                engines[name].scatter(kind, tensors.__getitem__)
            engines[name].renew(images_seen=8)
            states[f"{before}-{name}"] = stepped(engines[name], images_seen=16)
        for a, b in (("off", "on"), ("off-on", "on-off")):
            for kind, one in states[a].items():
                other = states[b][kind]
                assert list(one) == list(other)
                # Adam makes whole steps of gradients that are rounding errors, as of keys' biases:
                # those moments are compared, and the weights that other gradients moved.
                all_of_it = kind.startswith("adam")
                felt = {n: all_of_it | (v > 1e-16) for n, v in states[a]["adam-v"].items()}
                off = [((one[n] - other[n]).abs() * felt[n]).max() for n in one]
                found[f"{a} {kind}"] = float(torch.stack(off).max())
    if world.is_main:
        (directory / "found.json").write_text(json.dumps(found))
    return 0


def test_training_goes_on_compiled_and_uncompiled_alike(tmp_path: Path) -> None:
    job = ranks.fork(tmp_path, partial(train, tmp_path), ranks=2)
    job.wait()
    assert (tmp_path / "found.json").exists(), job.text
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 2 * 5 and max(found.values()) < 1e-5, found


OFF = "this run computes uncompiled"


def compile_as_on_a_gpu(directory: Path, runs: list[list]) -> int:
    """As `ranks.work`, with compiled networks; how many graphs that took."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    plain = compute.compile_forward
    compute.is_compiled = lambda *_, **__: True  # type: ignore[assignment]
    compute.compile_forward = lambda net, *, say: plain(net, say=say, backend=backend)  # type: ignore[assignment]
    ranks.work(directory, runs, False)
    (directory / "graphs").write_text(str(len(graphs)))
    return 0


@pytest.mark.slow
def test_a_run_compiles_its_network_once(tmp_path: Path, tiny: Path, digits: Path) -> None:
    """With dropout, dropped labels, averages, grids, validation and audits, over all its steps."""
    dropped = ("model.dropout = 0.1", "training.label_dropout = 0.2", f"intervals.audit = {STEP}")
    validated = (f'data.validation = "{digits}"', f"intervals.validate = {HALF}")
    sets = (*GRIDS, *dropped, *validated, "data.validation_images = 50")
    run = Place(tmp_path, tiny).arguments("run", sets=sets)
    task = partial(compile_as_on_a_gpu, tmp_path / "job", [run])
    job = ranks.fork(tmp_path / "job", task, ranks=1)
    job.wait()
    assert job.statuses == [0] and job.text.count("compiled the network in") == 1, job.text
    assert (tmp_path / "job" / "graphs").read_text() == str(len(UNet.parts))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_cpu_says_that_it_computes_otherwise(stage: int) -> None:
    said = compute.remarks(configs.load("imagenet64").training, stage=stage, ranks=8)
    settings = [line.split()[0] for line in said]
    assert settings == ["training.kernels", "training.precision", "training.compile"]
    assert '"fp16" is some 50 times slower' in said[1]
    assert not compute.remarks(configs.load("digits").training, stage=stage, ranks=8)


def test_more_threads_than_a_container_has_cpus_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(compute, "cpus", lambda: 1)
    try:
        torch.set_num_threads(2)
        [said] = compute.remarks(configs.load("digits").training, stage=2, ranks=1)
    finally:
        torch.set_num_threads(before)
    assert said == "torch uses 2 threads on 1 CPUs: set OMP_NUM_THREADS=1"


@pytest.mark.parametrize("name", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_torchs_own_switches_are_said_and_followed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    training, device = configs.load("imagenet64").training, torch.device("cuda")
    for value, is_on in ("0", True), ("1", False):
        monkeypatch.setenv(name, value)
        assert compute.is_compiled(training, device=device, stage=2) == is_on
        said = compute.remarks(training, stage=2, ranks=8)
        assert said == ([] if is_on else [f"training.compile: {name} = 1 switches it off: " + OFF])


def test_what_is_said_of_compiling_is_also_of_the_backward_pass() -> None:
    order: list[str] = []

    def note(name: str, graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        order.append(name)
        return graph

    passes = {f"{name}_compiler": partial(note, name) for name in ("fw", "bw")}
    net = filled(ClassifierConfig(**SIZES))
    x, t, _ = inputs(2)
    compute.compile_forward(net, say=order.append, backend=aot_autograd(**passes))
    loss = net(x, t).sum()
    assert order[1:-1] == ["fw", "bw"] * len(net.parts)
    assert order[-1].startswith("compiled the network in")
    said = len(order)
    loss.backward()
    net(x, t).sum().backward()
    assert len(order) == said and all(p.grad is not None for p in net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(**{**LEVELS, "small_size": 4}),
        UNetConfig(**{**LEVELS, "channel_mult": (1,), "attention": (8,), "checkpoint": True}),
        ClassifierConfig(**LEVELS, pool="spatial"),
    ],
    ids=["upsampler", "one level, recomputed", "spatial classifier"],
)
def test_a_net_compiled_in_parts_is_the_same_in_double_precision(config: Any) -> None:
    net = filled(config).double()
    given = {name: torch.ones(v.shape) for name, v in example_inputs(config, images=2).items()}
    x, t = golden.wave("x", (2, 3, 8, 8), 1.0).double().requires_grad_(), torch.tensor([3, 700])
    others = {name: v.to(torch.long if name == "y" else torch.double) for name, v in given.items()}
    others = {name: v for name, v in others.items() if name not in "xt"}

    def found() -> list[Tensor]:
        out = net(x, t, **others)
        gradients = torch.autograd.grad(out.square().sum(), [x, *net.parameters()])
        return [out, *gradients]

    plain = found()
    compute.compile_forward(net, say=lambda _: None, backend="aot_eager")
    for one, other in zip(plain, found(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


def test_gradients_of_a_part_are_handed_over_before_the_next_is_computed() -> None:
    net = filled(UNetConfig(**{**SIZES, "channel_mult": (1, 2)}))
    there, views = list[int](), list[Tensor]()

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        def run(*args: Any) -> Any:
            there.append(sum(p.grad is not None for p in net.parameters()))
            out = graph(*args)
            maps = [g for g in out if g is not None and g.dim() == 4 and len(g) == 2]
            views.extend(g for g in maps if g.untyped_storage().nbytes() != g.nbytes)
            return out

        return make_boxed_func(run)

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=count)
    compute.compile_forward(net, say=lambda _: None, backend=backend)
    net(*inputs(2)).sum().backward()
    first = [net.time_embed, net.label_emb, *list(net.input_blocks)[: net.upper]]
    late = sum(len(list(module.parameters())) for module in first)
    last = len(list(net.out.parameters()))
    assert len(there) == len(net.parts) and there[0] == 0
    assert not views  # autograd copies those
    assert there[1] > last and there[2] == len(list(net.parameters())) - late


def test_a_compiled_gradient_of_a_doubled_map_is_no_scattered_addition() -> None:
    operations: list[str] = []

    def note(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(resize, backend=aot_autograd(fw_compiler=note, bw_compiler=note))
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    compiled(x, "up").sum().backward()
    assert any("avg_pool2d" in name for name in operations)
    assert not any("index_put" in name for name in operations), operations
