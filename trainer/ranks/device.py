"""What a rank computes on, and the network interfaces that it is told to use, as they are here."""

import os
import socket

import torch

from trainer.ranks.world import World, host_name


def device_of(world: World, *, gpus: int | None = None) -> torch.device:
    """This rank's GPU, or the CPU on a machine that has none.

    `gpus` is how many this machine must show: 0 asks for CPUs, and None for whatever there is.

    Raises:
        ValueError: fewer GPUs than `gpus`, or than ranks on this machine, or any for 0.
        RuntimeError: the GPU is broken, or another process fills it.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # Slurm may show each task only its own GPU; then that one is number 0.
    needed = min(gpus or 0, 1) if world.own_gpu else gpus or 0
    shows = f"{host_name()} shows {count} GPUs"
    if count < needed:
        raise ValueError(
            f"{shows}, and the job needs {needed}: look at `nvidia-smi` and CUDA_VISIBLE_DEVICES "
            "there; to train on CPUs, set cpu = true in the cluster file, or start with --gpus 0"
        )
    if gpus == 0 and count:
        raise ValueError(f"--gpus 0, but {shows}: hide them with CUDA_VISIBLE_DEVICES=''")
    if not count:
        return torch.device("cpu")
    index = 0 if count == 1 and world.local_size > 1 and world.own_gpu else world.local_rank
    if index >= count:
        raise ValueError(f"{world.local_size} ranks but {shows}: start one rank for each GPU")
    torch.cuda.set_device(index)
    torch.zeros((), device="cuda").item()
    return torch.device("cuda", index)


def check_interfaces() -> None:
    """Raise ValueError unless the network interfaces that gloo is told to use are here."""
    own = [name for _, name in socket.if_nameindex()]
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in own:
            raise ValueError(
                f"GLOO_SOCKET_IFNAME = {name!r}: {host_name()} has no such network "
                f"interface; it has: {', '.join(own)}"
            )
