"""The training step on a GPU against its peers, in one command.

    python -m bench.gpu [--guided-diffusion PATH] [--out FILE] [--seconds 540] [--sizes 64 256 128]

Every cell is a process of its own with a deadline, which imports what it needs while the one before
is measured; its figures are appended to the file as one line of JSON, so that a run that is cut off
reports what it has. The same command measures the cells that the file lacks from this code on this
device.

The two ceilings come first, a large matrix product and a copy; then what is claimed, at the same
images for all systems, size by size; then the rest. A network of 300 to 550 million parameters
takes one to three minutes to compile on 16 cores, and cuDNN's choice of algorithms half a minute:
540 s are enough for about four compiled cells, those of the first size and one more. Where a device
is lent by the quarter of an hour, these are two commands, and a third on the next one:

    python -m pytest -m gpu tests/test_gpu*.py tests/test_data_stream.py   # under two minutes
    python -m bench.gpu --guided-diffusion PATH --out FILE    # 9 minutes; again to go on

The first names its files, since others import packages that a machine of GPUs may lack. Triton
needs a C compiler, the cells of C++ a C++ compiler and CUDA's toolkit (by nvcc or `CUDA_HOME`);
where that has no stub of libcuda.so to link with, `LIBRARY_PATH` must name a directory with one.

What the cells answer: the first at 64, 256 and 128 pixels, how many times faster a step is than
guided-diffusion's, as published, and diffusers' compiled; "rest", than theirs compiled and in the
other layout; "guided", how many images are drawn. Then what decides a setting: the most images, how
to convolve doubled maps, and at 64 and at 4 images whether CUDA graphs or C++ lift the limit of the
host. At last what each part of ours gains, bf16, and norm and attention alone, without the host.

On a CPU each cell is small (16 pixels, compiled by aot_eager).

Systems: ours in channels first as it was; in channels last with torch's norm; with the fused norm;
each of them compiled; the best with doubled maps convolved in two other ways (`bench/nets.py`), and
with CUDA graphs and kernels launched from C++, since at 64 images and fewer the host limits it;
guided-diffusion in fp16, as it is published and compiled; diffusers compiled in both layouts, but
at 128 px, where it cannot be the published network, which has 4 heads at every width.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.version import commit
from trainer.config import experiment as configs

#: Images at once: the most that should fit 80 GB, and those at which all systems are compared.
LARGEST, EQUAL = {64: 256, 128: 128, 256: 32}, {64: 64, 128: 32, 256: 8}
#: Sizes whose published network diffusers can be.
DIFFUSERS = (64, 256)
#: 16-bit TFLOP/s of the datasheet (H100 and H200 SXM).
DATASHEET = 989.0
BEST = "ours, fused, compiled"
#: Images of a GPU where the paper's batch at 64 px is cut among 512: there the host may limit.
SHARE = 4
Cell = dict[str, Any]
Process = subprocess.Popen[str]
# What the table does not repeat.
_UNTOLD = ("limit", "asked", "commit", "date", "device", "torch", "path")


def cells(*, sizes: Sequence[int], guided_diffusion: Path | None, gpu: bool) -> Iterator[Cell]:
    """What is measured, the most telling first."""
    half, path = "fp16" if gpu else "fp32", str(guided_diffusion)
    theirs, rest = ["diffusers, compiled, channels last"], ["diffusers, compiled"]
    drawing = [BEST]
    if guided_diffusion is not None:
        theirs.insert(0, "guided-diffusion")
        rest.insert(0, "guided-diffusion, compiled")
        drawing.append("guided-diffusion")
    step = {"kind": "step", "precision": half, "path": path, "limit": 300}
    yield {"kind": "ceilings", "limit": 60}
    for names in ((BEST, *theirs), rest):
        for size in sizes:
            there = possible(names, size)
            yield from ({**step, "size": size, "system": n, "images": EQUAL[size]} for n in there)
    for name in drawing:
        draw = {"kind": "guided", "system": name, "size": sizes[0], "path": path}
        yield {**draw, "precision": half, "images": 64, "limit": 300}
    for size in sizes:
        yield from (
            {**step, "size": size, **each} for each in others(size, peers=theirs + rest, gpu=gpu)
        )
    yield from operations(half, gpu=gpu)


def others(size: int, *, peers: Sequence[str], gpu: bool) -> Iterator[Cell]:
    """Further steps of a size: at the most images, at few, and ours without its parts."""
    for name in (BEST, f"{BEST}, phases", f"{BEST}, transposed"):
        yield {"system": name, "images": LARGEST[size]}
    if size == 64:
        yield {"system": BEST, "images": SHARE}
        for name in (f"{BEST}, graphs", f"{BEST}, C++"):
            yield from ({"system": name, "images": images} for images in (EQUAL[size], SHARE))
    for name in ("ours, fused", "ours, compiled", "ours, channels first"):
        yield {"system": name, "images": EQUAL[size]}
    if gpu:
        yield {"system": "ours", "images": EQUAL[size]}
        yield {"system": BEST, "images": LARGEST[size], "precision": "bf16"}
        for name in possible(peers, size):
            yield {"system": name, "images": LARGEST[size]}


def possible(systems: Sequence[str], size: int) -> list[str]:
    """Those of the systems that can be the published network of this size."""
    return [name for name in systems if size in DIFFUSERS or "diffusers" not in name]


def operations(half: str, *, gpu: bool) -> Iterator[Cell]:
    """The norm, and attention, alone."""
    alone = {"precision": half, "limit": 60}
    for shape in ([192, 64, 64], [768, 8, 256], [256, 256, 8])[: 3 if gpu else 1]:
        for kernels in ("fused", "plain"):
            yield {"kind": "norm", "shape": shape, "kernels": kernels, **alone}
    for shape in ([64, 16, 256], [256, 12, 128], [1024, 6, 64])[: 3 if gpu else 1]:
        yield {"kind": "attention", "shape": shape, **alone}


def needed(cell: Cell, *, gpu: bool) -> float:
    """Seconds without which a cell need not begin."""
    if not gpu:
        return 5.0
    return 100.0 if "compiled" in cell.get("system", "") else 20.0


def known(file: Path, own: Cell) -> list[Cell]:
    """The rows that a file has from this code on this device, but for errors."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    same = ("commit", "device", "torch")
    return [row for row in rows if "error" not in row and all(row[k] == own[k] for k in same)]


def waiting() -> Process:
    """A process that imports what cells need and waits for its own, while another is measured."""
    command = [sys.executable, "-m", "bench.gpu", "--cell"]
    pipe, env = subprocess.PIPE, environment()
    return subprocess.Popen(command, env=env, text=True, stdin=pipe, stdout=pipe, stderr=pipe)


def environment() -> dict[str, str]:
    """With CUDA_HOME, where nvcc is: by that alone Inductor links C++ with the stub of libcuda."""
    nvcc = shutil.which("nvcc")
    home = {"CUDA_HOME": str(Path(nvcc).resolve().parents[1])} if nvcc else {}
    return {**home, **os.environ}


def measure(process: Process, cell: Cell, *, limit: float) -> Cell:
    """A cell's figures, or its error, by a process that waits."""
    try:
        out, said = process.communicate(json.dumps(cell), timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {limit:.0f} s"}
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        return {"error": (said.strip().splitlines() or ["?"])[-1][:300]}
    found: Cell = json.loads(out.splitlines()[-1])
    return found


def origin() -> Cell:
    """Which code ran on what."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "torch": torch.__version__,
    }


def table(rows: Sequence[Cell]) -> str:
    """The steps as a table: MFU against the matrix product that was measured and the datasheet."""
    peak = {k: v for row in rows if row["kind"] == "ceilings" for k, v in row.items()}
    lines = [
        "| size | system | precision | images | images/s | MFU measured, datasheet | GiB "
        "| host ms | first step s |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        if row["kind"] != "step":
            shown = {k: v for k, v in row.items() if k not in _UNTOLD}
            lines.append(f"| {json.dumps(shown)} |")
        elif "error" in row:
            lines.append(f"| {row['size']} | {row['system']} | {row['error']} |")
        else:
            done, best = row["model TFLOP/s"], peak.get(f"{row['precision']} TFLOP/s", 0)
            shares = f"{done / best:.1%}, {done / DATASHEET:.1%}" if best else "?"
            lines.append(
                f"| {row['size']} | {row['system']} | {row['precision']} | {row['images']} "
                f"| {row['images/s']:.1f} | {shares} | {row['peak GiB'] or 0:.1f} "
                f"| {row['host ms']:.1f} | {row['first step s']:.1f} |"
            )
    return "\n".join(lines)


def check(options: argparse.Namespace, *, parser: argparse.ArgumentParser) -> None:
    """End with an error where a cell would, after the time of others."""
    from trainer.engine import compute  # torch, which takes seconds

    path = options.guided_diffusion
    if path is not None and not (path / "guided_diffusion" / "unet.py").is_file():
        parser.error(f"--guided-diffusion {path}: it has no guided_diffusion/unet.py")
    try:
        options.out.open("a").close()
        compute.check(configs.load("imagenet64").training)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m bench.gpu`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    add = parser.add_argument
    add("--guided-diffusion", type=Path, help="a checkout of it (default: left out)")
    add("--out", type=Path, default=Path("bench-gpu.jsonl"), help="default: %(default)s")
    add("--seconds", type=float, default=540.0, help="the whole time (default: %(default)g)")
    known_sizes, default = list(EQUAL), [64, 256, 128]
    help_text = "default: %(default)s"
    add("--sizes", type=int, nargs="+", choices=known_sizes, default=default, help=help_text)
    add("--most", type=int, help="only so many cells (default: all)")
    add("--cell", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.cell:
        from bench.cells import KINDS

        cell = json.load(sys.stdin)
        print(json.dumps(KINDS[cell["kind"]](cell)), flush=True)
        # Autograd's threads may still free what a cell made, which aborts a Python that ends.
        os._exit(0)
    check(options, parser=parser)
    end, own = time.monotonic() + options.seconds, origin()
    gpu, rows = own["device"] != "cpu", known(options.out, own)
    todo = list(cells(sizes=options.sizes, guided_diffusion=options.guided_diffusion, gpu=gpu))
    todo = [cell for cell in todo if all(row["asked"] != cell for row in rows)][: options.most]
    left_out, process = 0, waiting()
    for cell in todo:
        left = end - time.monotonic()
        if left < needed(cell, gpu=gpu):
            left_out += 1
            continue
        now, process = process, waiting()
        found = measure(now, cell, limit=min(cell["limit"], left))
        rows.append({**own, "asked": cell, **cell, **found})
        with options.out.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(json.dumps({k: v for k, v in rows[-1].items() if k not in _UNTOLD}), flush=True)
    process.kill()
    process.wait()
    if left_out:
        print(f"the time is over: {left_out} of {len(todo)} cells are left to the next command")
    print(table(rows))
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
