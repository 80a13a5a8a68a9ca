"""What a run leaves when it dies: where each rank stood, and what filled the memory.

All of it goes to `RUN/launch/`: the stacks of a rank's threads, its last collectives (of NCCL and
gloo; `torchfrtrace` compares those of all ranks), and on a GPU a snapshot for
https://pytorch.org/memory_viz.
"""

import faulthandler
import gc
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

# Kinds of tensors that are listed.
_LISTED = 30


def dump(directory: Path, *, rank: int) -> None:
    """Write where every thread of this rank stands, and its last collectives."""
    with suppress(OSError), (directory / f"stacks_rank_{rank}").open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    for name in ("nccl", "fr"):
        traced = getattr(torch._C._distributed_c10d, f"_dump_{name}_trace", None)
        if traced is not None:
            with suppress(OSError, RuntimeError):
                (directory / f"{name}_trace_rank_{rank}").write_bytes(traced())


@contextmanager
def out_of_memory_kept(directory: Path, *, rank: int) -> Iterator[None]:
    """Write what fills the memory if it runs out meanwhile; the error goes on."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        file = directory / f"memory_rank_{rank}.txt"
        try:
            file.write_text(_summary(error))
            if torch.cuda.is_available():
                torch.cuda.memory._dump_snapshot(str(file.with_suffix(".pickle")))
        except Exception as fault:  # nothing of this may take the place of the error
            print(f"cannot write {file}: {fault}", file=sys.stderr)
        else:
            print(
                f"rank {rank} is out of memory, see {file}; lower training.micro_batch, or set "
                "model.checkpoint = true",
                file=sys.stderr,
                flush=True,
            )
        raise


def _is_out_of_memory(error: BaseException) -> bool:
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _summary(error: BaseException) -> str:
    """The error, the allocator's account, and the tensors that Python holds, largest first."""
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for each in gc.get_objects():
        if type(each) in (Tensor, torch.nn.Parameter) and not each.is_meta:
            kind = f"{each.device} {each.dtype} {tuple(each.shape)}"
            sizes[kind] += each.nbytes
            counts[kind] += 1
    tensors = [
        f"{n / 2**20:12,.1f} MiB  {counts[k]:5} x {k}" for k, n in sizes.most_common(_LISTED)
    ]
    account = [torch.cuda.memory_summary()] if torch.cuda.is_available() else []
    return "\n".join([str(error), "", *account, "Tensors that Python holds:", *tensors, ""])
