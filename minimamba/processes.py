"""One program on many devices: each process trains on its own windows, and the gradients are averaged between them.

    g = (g_1 + ... + g_P) / P        what DistributedDataParallel leaves in every process after the backward pass

torchrun starts the processes and tells each its rank; without torchrun there is one, and nothing here talks to anybody.
"""

import gc
import os
import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def join(kind=None):
    """Join the other processes if torchrun started this one. Return this one's device: `kind`, by default a GPU."""
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(kind)
    if "RANK" not in os.environ:
        return device
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return device


def leave():
    """Take leave of the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # models that know the group go now: its threads must not outlive the interpreter


def rank_and_count():
    """Return this process's number, from 0 on, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def spread(model, fsdp=False):
    """Return a model whose backward pass averages the gradients over the processes.

    By default every process holds the whole model (DistributedDataParallel). fsdp: each holds a part of every weight
    and of its moments in AdamW; a layer's weights are gathered when it runs and dropped after it (`fully_shard`).
    """
    if not dist.is_initialized():
        if fsdp:
            raise ValueError("fsdp: expected processes started by torchrun, got one without")
        return model
    if not fsdp:
        return DistributedDataParallel(model)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # its output is a view: nobody writes into it
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for layer in model.backbone.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def mean(value):
    """Return the mean of a scalar tensor over all processes, as a float."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value.item()


def whole(tensor):
    """Return in one piece a tensor that `spread` has cut up between the processes, and any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
