"""The training step on a GPU against its peers, in one command.

    python -m bench.gpu [--guided-diffusion PATH] [--out FILE] [--seconds 540] [--sizes 64 256 128]

Every cell is a process of its own with a deadline; its figures are appended to the file as one
line of JSON, so that a run that is cut off reports what it has. The two ceilings come first: a
large matrix product and a copy. On a CPU each cell is small (16 pixels, compiled by aot_eager).

Systems: ours in channels first as it was; in channels last with torch's norm; with the fused norm;
each of them compiled; the best with CUDA graphs, at few images, where the host limits;
guided-diffusion in fp16; diffusers compiled in both layouts.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

#: Images at once: the most that should fit 80 GB, and those at which all systems are compared.
LARGEST, EQUAL = {64: 256, 128: 128, 256: 32}, {64: 64, 128: 32, 256: 8}
#: 16-bit TFLOP/s of the datasheet (H100 and H200 SXM).
DATASHEET = 989.0
BEST = "ours, fused, compiled"
#: Images of a GPU where the paper's batch at 64 px is cut among 512: there the host may limit.
SHARE = 4
Cell = dict[str, Any]


def cells(*, sizes: Sequence[int], guided_diffusion: Path | None, gpu: bool) -> Iterator[Cell]:
    """What is measured, the most telling first."""
    half, path = "fp16" if gpu else "fp32", str(guided_diffusion)
    peers = ["diffusers, compiled", "diffusers, compiled, channels last"]
    if guided_diffusion is not None:
        peers.insert(0, "guided-diffusion")
    yield {"kind": "ceilings", "limit": 60}
    shapes = ((192, 64, 64), (768, 8, 256), (256, 256, 8))
    for shape in shapes[: 3 if gpu else 1]:
        for kernels in ("fused", "plain"):
            yield {
                "kind": "norm",
                "shape": shape,
                "kernels": kernels,
                "precision": half,
                "limit": 60,
            }
    for size in sizes:
        step = {"kind": "step", "size": size, "precision": half, "path": path, "limit": 240}
        yield from ({**step, **each} for each in steps(size, peers=peers, gpu=gpu))
    for shape in ((64, 16, 256), (256, 12, 128), (1024, 6, 64))[: 3 if gpu else 1]:
        yield {"kind": "attention", "shape": shape, "precision": half, "limit": 60}
    for name in (BEST, *peers[:-2]):
        draw = {"kind": "guided", "system": name, "size": sizes[0], "path": path}
        yield {**draw, "precision": half, "images": 64, "limit": 240}


def steps(size: int, *, peers: Sequence[str], gpu: bool) -> Iterator[Cell]:
    """The systems of a size, with the images of a step."""
    yield {"system": BEST, "images": LARGEST[size]}
    own = (BEST, "ours, fused", "ours, channels first", "ours, compiled")
    for name in (*peers, *own):
        yield {"system": name, "images": EQUAL[size]}
    if size == 64:
        for name in (BEST, f"{BEST}, graphs"):
            yield {"system": name, "images": SHARE}
    if gpu:
        yield {"system": "ours", "images": EQUAL[size]}
        yield {"system": BEST, "images": LARGEST[size], "precision": "bf16"}
        for name in peers:
            yield {"system": name, "images": LARGEST[size]}


def measure(cell: Cell, *, limit: float) -> Cell:
    """A cell's figures, or its error."""
    command = [sys.executable, "-m", "bench.gpu", "--cell", json.dumps(cell)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {limit:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["?"])[-1][:300]}
    found: Cell = json.loads(done.stdout.splitlines()[-1])
    return found


def origin() -> Cell:
    """Which code ran on what."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    gpu = torch.cuda.is_available()
    return {
        "commit": commit.stdout.strip(),
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
            lines.append(f"| {json.dumps({k: v for k, v in row.items() if k != 'limit'})} |")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m bench.gpu`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    add = parser.add_argument
    add("--guided-diffusion", type=Path, help="a checkout of it (default: left out)")
    add("--out", type=Path, default=Path("bench-gpu.jsonl"), help="default: %(default)s")
    add("--seconds", type=float, default=540.0, help="the whole time (default: %(default)g)")
    add("--sizes", type=int, nargs="+", default=[64, 256, 128], help="default: %(default)s")
    add("--most", type=int, help="only so many cells (default: all)")
    add("--cell", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.cell is not None:
        from bench.cells import KINDS

        print(json.dumps(KINDS[options.cell["kind"]](options.cell)))
        return 0
    end, own, rows = time.monotonic() + options.seconds, origin(), list[Cell]()
    gpu = own["device"] != "cpu"
    todo = cells(sizes=options.sizes, guided_diffusion=options.guided_diffusion, gpu=gpu)
    for cell in list(todo)[: options.most]:
        left = end - time.monotonic()
        if left < 5:
            print("the time is over: the rest is left out")
            break
        rows.append({**cell, **measure(cell, limit=min(cell["limit"], left))})
        with options.out.open("a") as file:
            file.write(json.dumps({**own, **rows[-1]}) + "\n")
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
