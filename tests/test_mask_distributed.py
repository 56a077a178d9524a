"""Masked weights under DDP, FSDP2 and tensor parallelism, two processes on CPUs."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from maskllm4v import make_learnable
from maskllm4v.sparsity.learnable import NoiseKey
from maskllm4v.sparsity.parameters import learnable_masks
from maskllm4v.sparsity.surgery import set_noise_key
from maskllm4v.utils.errors import ConfigError


class Block(nn.Module):
    """Reads one layer's weight itself, and calls the other."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.called(torch.tanh(F.linear(x, self.read.weight, self.read.bias)))


def model() -> nn.Module:
    torch.manual_seed(0)
    return make_learnable(nn.Sequential(Block(), Block()), None, pattern="2:4").train()


def inputs(rank: int) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(rank))


def learn(net: nn.Module, run: Any, rank: int) -> dict[str, Tensor]:
    set_noise_key(net, NoiseKey(step=3))
    run(inputs(rank)).square().sum().backward()
    return {name: mask.logits.grad for name, mask in learnable_masks(net).items()}


def _along(parameter: nn.Parameter) -> Shard:
    """Logits ``[6, groups]`` are cut along their groups."""
    return Shard(1) if parameter.dim() == 2 and parameter.shape[0] == 6 else Shard(0)


def _run(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    net = model()
    found["ddp"] = learn(net, nn.parallel.DistributedDataParallel(net), rank)
    mesh, net = init_device_mesh("cpu", (2,)), model()
    for part in (*net, net):
        fully_shard(part, mesh=mesh, shard_placement_fn=_along)
    found["fsdp"] = {name: grad.full_tensor() for name, grad in learn(net, net, rank).items()}  # type: ignore[attr-defined]
    try:
        parallelize_module(model(), mesh, {"0.called": ColwiseParallel()})
    except ConfigError as error:
        found["tp"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_run, (port, str(tmp_path)), nprocs=2)
    alone = [learn(net := model(), net, rank) for rank in (0, 1)]
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for kind in ("ddp", "fsdp"):
            assert found[kind].keys() == alone[0].keys()
            for name, grad in found[kind].items():
                wanted = (alone[0][name] + alone[1][name]) / 2
                assert wanted.any()
                torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
        assert "cannot be cut up by tensor parallelism" in found["tp"]
