"""Several processes that compute together, through Accelerate; with one process nothing here costs anything.

Processes are started by ``torchrun``, ``accelerate launch`` or Slurm; they tell one another apart by the
environment variables that those set.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def world_size() -> int:
    """How many processes compute together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes files."""
    return rank() == 0


def join(device: torch.device) -> None:
    """Meet the other processes (NCCL on GPUs, gloo on CPUs); does nothing for one process or a second time."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu")


def sum_(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all processes."""
    if world_size() > 1:
        import torch

        for tensor in tensors:
            join(tensor.device)
            torch.distributed.all_reduce(tensor)


def wait() -> None:
    """Until all processes are here."""
    if world_size() > 1:
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.barrier()


def same_everywhere(value: Any, device: torch.device) -> Any:
    """The main process's value, in all processes."""
    if world_size() == 1:
        return value
    import torch

    join(device)
    values = [value]
    torch.distributed.broadcast_object_list(values, device=device)
    return values[0]


def leave() -> None:
    """Wait for the others and part."""
    if world_size() > 1:
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
