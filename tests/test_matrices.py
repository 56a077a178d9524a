"""What else multiplies activations: attention's three matrices in one, transposed layers, stacks of experts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskllm4v
from maskllm4v import NMPattern, current_masks, dense_weight, fold_, make_learnable, prune, update_weights_
from maskllm4v.checkpoints.masks import MaskCheckpoint, load_masks, save_masks
from maskllm4v.checkpoints.third_party import LoadedWeights, load_any
from maskllm4v.export.verify import passes, verify_file
from maskllm4v.sparsity.parameters import learnable_masks, masked_parameters
from maskllm4v.sparsity.survey import survey


class Conv1D(nn.Module):
    """As in transformers: ``x @ weight + bias``, the weight ``[in, out]``."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Experts(nn.Module):
    """As in transformers, ``[experts, out, in]`` or ``[experts, in, out]``; no token comes to the last one."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = 3, transposed
        up, down = torch.randn(3, 24, 16) / 4, torch.randn(3, 16, 24) / 4
        self.up_proj = nn.Parameter(up.transpose(1, 2).contiguous() if transposed else up)
        self.down_proj = nn.Parameter(down.transpose(1, 2).contiguous() if transposed else down)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, mine in enumerate((x[..., 0] > 0, x[..., 0] <= 0)):
            if self.is_transposed:
                y[mine] = torch.tanh(x[mine] @ self.up_proj[i]) @ self.down_proj[i]
            else:
                y[mine] = F.linear(torch.tanh(F.linear(x[mine], self.up_proj[i])), self.down_proj[i])
        return y


class Net(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.conv, self.experts = Conv1D(16, 16), Experts(transposed=transposed)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(16, 2, kdim=16, vdim=16, batch_first=True)
        self.other = nn.MultiheadAttention(16, 2, kdim=8, vdim=12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv(x)
        x = x + self.experts(x)
        x = x + self.attention(x, x, x)[0]
        memory = torch.tanh(x[:, :3])
        return x + self.cross(x, memory, 2 * memory)[0] + self.other(x, memory[..., :8], memory[..., :12])[0]


NAMES = [
    "conv",
    "experts.up_proj",
    "experts.down_proj",
    "attention.in_proj_weight",
    "attention.out_proj",
    "cross.in_proj_weight",
    "cross.out_proj",
    "other.q_proj_weight",
    "other.k_proj_weight",
    "other.v_proj_weight",
    "other.out_proj",
]
X = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(0))
both = pytest.mark.parametrize("transposed", [False, True])


def net(transposed: bool) -> nn.Module:
    torch.manual_seed(1)
    return Net(transposed).eval()


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(matrix.rows.shape) for name, matrix in survey(model).prunable.items()}


@both
def test_matrices_are_found_as_rows(transposed: bool) -> None:
    found = shapes(net(transposed))
    assert list(found) == NAMES
    assert found["conv"] == (16, 16)
    assert found["experts.up_proj"] == (3, 24, 16)
    assert found["experts.down_proj"] == (3, 16, 24)
    assert found["attention.in_proj_weight"] == (48, 16)
    assert found["other.k_proj_weight"] == (16, 8)


@both
@pytest.mark.parametrize("method", ["magnitude", "random", "wanda", "ria", "sparsegpt"])
@pytest.mark.filterwarnings("ignore:.*no token came to")
def test_masks_lie_along_inputs_and_fold_to_the_same(transposed: bool, method: str) -> None:
    model, dense = net(transposed), net(transposed)
    masks = prune(model, method, calibration=[X], update_weights=method == "sparsegpt")
    assert list(masks) == NAMES
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == shapes(dense)
    assert all(NMPattern("2:4").is_valid(mask) for mask in masks.values())
    outputs = model(X)
    folded = fold_(copy.deepcopy(model))
    torch.testing.assert_close(folded(X), outputs, rtol=0, atol=1e-6)
    assert not torch.allclose(outputs, dense(X), atol=1e-3)
    for name, matrix in survey(folded).prunable.items():
        assert not matrix.rows[~masks[name]].any(), name
        assert matrix.rows.ne(0).flatten(0, -2).reshape(-1, 4).sum(1).le(2).all()


@both
def test_each_block_is_scored_by_its_own_inputs(transposed: bool) -> None:
    """Experts see their own tokens; query, key and value their own sequences."""
    model, seen = net(transposed), {}
    model.cross.register_forward_pre_hook(lambda _, args: seen.update(cross=args))
    model.experts.register_forward_pre_hook(lambda _, args: seen.update(experts=args[0]))
    with torch.no_grad():
        model(X)
    weight, inputs = model.cross.in_proj_weight.detach(), [x.reshape(-1, 16) for x in seen["cross"]]
    scores = torch.cat([w.abs() * x.square().sum(0).sqrt() for w, x in zip(weight.chunk(3), inputs, strict=True)])
    up = survey(model).prunable["experts.up_proj"].rows.detach().clone()
    mine = seen["experts"][..., 0] > 0
    tokens = [seen["experts"][mine], seen["experts"][~mine]]
    with pytest.warns(UserWarning, match="no token came to 1 of 3 experts, pruned by magnitude: 2") as warned:
        masks = prune(model, "wanda", calibration=[X])
    assert [str(one.message).split("'")[1] for one in warned] == ["experts.up_proj", "experts.down_proj"]
    assert torch.equal(masks["cross.in_proj_weight"], NMPattern("2:4").topn_mask(scores))
    for i, x in enumerate(tokens):
        assert torch.equal(masks["experts.up_proj"][i], NMPattern("2:4").topn_mask(up[i].abs() * x.norm(dim=0)))
    assert torch.equal(masks["experts.up_proj"][2], NMPattern("2:4").topn_mask(up[2].abs()))


@both
@pytest.mark.parametrize("gate", ["candidates", "positions"])
def test_their_masks_are_learned(transposed: bool, gate: str) -> None:
    model = make_learnable(net(transposed), None, pattern="2:4", gate=gate).train()
    for mask in learnable_masks(model).values():
        mask.tau, mask.scaling = 1.0, 1.0
    assert not any(p.requires_grad for n, p in model.named_parameters() if not n.endswith("logits"))
    model(X).square().sum().backward()
    assert list(learnable_masks(model)) == NAMES
    for name, mask in learnable_masks(model).items():
        learns = mask.logits.grad.ne(0).any(0).reshape(mask.shape[0], -1)
        used = slice(2) if "experts" in name else slice(None)
        assert learns[used].float().mean() > 0.9, name
        assert "experts" not in name or not learns[2].any()
    prior = current_masks(model)
    strong = make_learnable(net(transposed), prior, pattern="2:4", gate=gate, gate_std=1e-3, prior_strength=50.0)
    assert all(torch.equal(mask, prior[name]) for name, mask in current_masks(strong).items())


class Routed(Experts):
    """The experts, computed all at once: their rows side by side, or a copy of a matrix for each token."""

    def __init__(self, how: str, *, transposed: bool) -> None:
        super().__init__(transposed=transposed)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        chosen = (rows[:, 0] <= 0).long()  # the last expert gets none
        order = chosen.argsort(stable=True)
        ends = torch.bincount(chosen, minlength=self.num_experts).cumsum(0).int()
        if self.how == "grouped":
            y = torch.tanh(F.grouped_mm(rows[order], self._columns(self.up_proj), offs=ends))
            out = torch.empty_like(rows).index_copy(0, order, F.grouped_mm(y, self._columns(self.down_proj), offs=ends))
        else:
            y = torch.tanh(self._picked(rows, self.up_proj[chosen]))
            out = self._picked(y, self.down_proj.index_select(0, chosen))
        return out.view_as(x)

    def _columns(self, stack: Tensor) -> Tensor:
        return stack if self.is_transposed else stack.transpose(-1, -2)

    def _picked(self, rows: Tensor, stack: Tensor) -> Tensor:
        if self.is_transposed:
            return torch.bmm(rows[:, None], stack)[:, 0]
        return torch.bmm(stack, rows[..., None])[..., 0]


@both
@pytest.mark.parametrize("how", ["grouped", "picked"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.filterwarnings("ignore:.*no token came to 1 of 3 experts")
def test_experts_that_are_computed_at_once_are_calibrated_alike(transposed: bool, how: str, method: str) -> None:
    one = nn.Sequential(Experts(transposed=transposed))
    other = nn.Sequential(Routed(how, transposed=transposed))
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other(X), one(X))
    masks, same = (prune(model, method, calibration=[X], propagate="pruned") for model in (one, other))
    assert masks.keys() == same.keys() == {"0.up_proj", "0.down_proj"}
    for name, mask in masks.items():
        assert (mask == same[name]).float().mean() > 0.99, name  # ties by rounding
    torch.testing.assert_close(other(X), fold_(copy.deepcopy(other))(X))


@both
@pytest.mark.parametrize("method", ["least_squares", "sparsegpt"])
@pytest.mark.filterwarnings("ignore:.*no token came to")
def test_updates_bring_outputs_nearer(transposed: bool, method: str) -> None:
    dense, batches = net(transposed), torch.randn(64, 5, 16)
    model = copy.deepcopy(dense)
    masks = prune(model, "magnitude")
    with torch.no_grad():
        before = (model(batches) - dense(batches)).square().mean()
        update_weights_(model, method, calibration=[batches], target="symmetric")  # routes differ
        after = (model(batches) - dense(batches)).square().mean()
    assert after < 0.95 * before
    for name, parameter in masked_parameters(model).items():
        assert not parameter.rows[~masks[name]].any()
        assert parameter.shape == survey(dense).prunable[name].shape


@both
def test_files_hold_them(tmp_path: Path, transposed: bool) -> None:
    dense = net(transposed)
    masks = prune(model := copy.deepcopy(dense), "magnitude")
    outputs = model(X)
    save_masks(tmp_path / "masks.safetensors", MaskCheckpoint(NMPattern("2:4"), masks, "base", "magnitude", {}, {}))
    found = load_masks(tmp_path / "masks.safetensors").masks
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    assert torch.equal(maskllm4v.apply_masks_(copy.deepcopy(dense), found, "2:4")(X), outputs)
    path = tmp_path / "packed.safetensors"
    maskllm4v.save_packed(fold_(model), masks, path)
    torch.testing.assert_close(maskllm4v.load_packed(net(transposed), path)(X), outputs, rtol=0, atol=1e-6)
    checks = verify_file(path)
    assert passes(checks)
    assert {check.layer for check in checks if check.verdict == "holds"} >= set(NAMES)


def test_cross_attention_keeps_its_dense_weights() -> None:
    model: Any = net(False)
    before = model.cross.in_proj_weight.detach().clone()
    prune(model, "magnitude")
    assert torch.equal(dense_weight(model.cross, "in_proj_weight"), before)
    assert not torch.equal(model.cross.in_proj_weight, before)


@both
def test_a_masked_state_dict_is_as_sparse_as_its_masks(transposed: bool, tmp_path: Path) -> None:
    """Its weights are dense."""
    model = net(transposed)
    prune(model, "magnitude")
    torch.save(model.state_dict(), tmp_path / "masked.pt")
    checks = verify_file(tmp_path / "masked.pt")
    assert {check.layer for check in checks if check.verdict == "holds"} == set(NAMES)
    assert passes(checks)
    model.experts.up_proj_mask.mask[0, 0, :4] = True
    torch.save(model.state_dict(), tmp_path / "broken.pt")
    broken = [check.layer for check in verify_file(tmp_path / "broken.pt") if check.verdict == "violated"]
    assert broken == ["experts.up_proj"]


def test_a_masked_state_dict_is_read_as_weights_and_masks(tiny_vit: nn.Module, tmp_path: Path) -> None:
    dense = {name: tensor.clone() for name, tensor in tiny_vit.state_dict().items()}
    masks = prune(tiny_vit, "magnitude")
    torch.save(tiny_vit.state_dict(), tmp_path / "masked.pt")
    found = load_any(tmp_path / "masked.pt")
    assert isinstance(found, LoadedWeights)
    assert found.weights.keys() == dense.keys()
    assert all(found.weights[name].equal(tensor) for name, tensor in dense.items())
    assert found.masks.keys() == masks.keys()
    assert all(found.masks[name].equal(mask) for name, mask in masks.items())
