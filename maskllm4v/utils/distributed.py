"""What several processes do together; with one process nothing here costs anything.

Accelerate starts the process group; all else is torch.distributed's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from maskllm4v.utils.processes import end_with_parent, rank, world_size

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def join(device: torch.device) -> None:
    """Meet the other processes (NCCL on GPUs, gloo on CPUs); does nothing for one process or a second time.

    From then on this process ends when what has launched it is killed.
    """
    if world_size() > 1:
        from accelerate import PartialState

        end_with_parent()
        PartialState(cpu=device.type == "cpu")


def sum_(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all processes."""
    if world_size() > 1:
        import torch

        for tensor in tensors:
            join(tensor.device)
            torch.distributed.all_reduce(tensor)


def mean(tensor: Tensor) -> Tensor:
    """The mean over all processes."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    sum_(total)
    return total / world_size()


def rows_of_all(own: Tensor, count: int) -> Tensor:
    """All processes' rows ``[count, ...]``, of which each has those whose number, modulo the processes, is its rank."""
    if world_size() == 1:
        return own
    whole = own.new_zeros(count, *own.shape[1:])
    whole[rank() :: world_size()] = own
    sum_(whole)
    return whole


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
