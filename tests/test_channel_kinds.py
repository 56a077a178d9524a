"""Hidden channels of torch's own attention and layers, of transposed layers and of stacks of experts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_matrices import Conv1D
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention
from torchvision.ops import MLP

from maskllm4v import NMPattern, apply_permutations_, invert_permutations, permute_channels_, prune
from maskllm4v.sparsity.parameters import find_matrix
from maskllm4v.sparsity.permutation import find_channels
from maskllm4v.sparsity.survey import survey
from maskllm4v.utils.errors import ConfigError, PatternError

X = torch.randn(3, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Gpt(nn.Module):
    """The MLP and the attention of GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Units(Conv1D(24, 16), Conv1D(16, 24))
        self.attn = Heads()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + self.attn(x)[0]


class Units(nn.Module):
    def __init__(self, c_fc: nn.Module, c_proj: nn.Module) -> None:
        super().__init__()
        self.c_fc, self.c_proj = c_fc, c_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.c_attn, self.c_proj = 2, Conv1D(48, 16), Conv1D(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


class Experts(nn.Module):
    """As in transformers: stacks of matrices, with gates or without, either way round; each token has two experts."""

    def __init__(self, *, gated: bool, transposed: bool = False, concatenated: bool = True, idle: int = 0) -> None:
        super().__init__()
        self.num_experts, self.is_transposed, self.is_concatenated = 4, transposed, concatenated
        self.gated, self.used = gated, 4 - idle
        self.first = "gate_up_proj" if gated else "up_proj"
        up, down = torch.randn(4, 24 * (1 + gated), 16) / 4, torch.randn(4, 16, 24) / 4
        self.register_parameter(self.first, nn.Parameter(up.mT.contiguous() if transposed else up))
        self.register_parameter(f"{self.first}_bias", nn.Parameter(torch.randn(4, 24 * (1 + gated))))
        self.down_proj = nn.Parameter(down.mT.contiguous() if transposed else down)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i in range(self.used):
            token, place = torch.where(index == i)
            up, down = getattr(self, self.first)[i], self.down_proj[i]
            up, down = (up, down) if self.is_transposed else (up.mT, down.mT)
            hidden = x[token] @ up + getattr(self, f"{self.first}_bias")[i]
            if self.gated:
                pairs = hidden.chunk(2, -1) if self.is_concatenated else (hidden[..., ::2], hidden[..., 1::2])
                hidden = pairs[0].sigmoid() * pairs[1]
            y.index_add_(0, token, (torch.tanh(hidden) @ down) * weights[token, place, None])
        return y


class Mixture(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(16, 4), experts

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gate(x.flatten(0, 1)).softmax(-1).topk(2)
        return self.experts(x.flatten(0, 1), index, weights).view(x.shape)


class Crossed(nn.Module):
    """Attention to other sequences, of other widths; both ways round."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, **how)

    def forward(self, x: Tensor) -> Tensor:
        key, value = torch.tanh(x)[..., : self.attention.kdim], torch.cos(x)[..., : self.attention.vdim]
        return self.attention(x, key, value)[0]


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = ShiftedWindowAttention(16, [2, 2], [0, 0], 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x.unflatten(1, (2, 4)))


def encoder(**how: Any) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, **how), 2)


def named(**modules: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(modules))


# A model, and the shapes of the orders of those matrices whose inputs can be permuted.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = {
    "Conv1D": (Gpt, {"mlp.c_proj": (24,), "attn.c_proj": (16,)}),
    "attention": (Crossed, {"attention.out_proj": (16,)}),
    "attention, batch first": (lambda: Crossed(batch_first=True), {"attention.out_proj": (16,)}),
    "attention of other widths": (lambda: Crossed(kdim=8, vdim=12), {"attention.out_proj": (16,)}),
    "attention without biases": (lambda: Crossed(bias=False), {"attention.out_proj": (16,)}),
    "attention, a token more": (lambda: Crossed(add_bias_kv=True), {"attention.out_proj": (16,)}),
    "attention, a zero more": (lambda: Crossed(add_zero_attn=True), {"attention.out_proj": (16,)}),
    "encoder": (
        encoder,
        {
            f"layers.{i}.{name}": shape
            for i in range(2)
            for name, shape in (("linear2", (24,)), ("self_attn.out_proj", (16,)))
        },
    ),
    "experts": (lambda: Mixture(Experts(gated=False)), {"experts.down_proj": (4, 24)}),
    "experts, transposed": (lambda: Mixture(Experts(gated=False, transposed=True)), {"experts.down_proj": (4, 24)}),
    "experts with gates": (lambda: Mixture(Experts(gated=True)), {"experts.down_proj": (4, 24)}),
    "experts with gates side by side": (
        lambda: Mixture(Experts(gated=True, transposed=True, concatenated=False)),
        {"experts.down_proj": (4, 24)},
    ),
    "MLP of torchvision": (lambda: named(mlp=MLP(16, [24, 16], activation_layer=nn.GELU)), {"mlp.3": (24,)}),
    "windows of torchvision": (Windows, {"attn.proj": (16,)}),
}
every_model = pytest.mark.parametrize("kind", MODELS)


def built(kind: str) -> nn.Module:
    """In float64, evaluating, and no weight zero or one."""
    model = MODELS[kind][0]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def shuffled(model: nn.Module) -> dict[str, Tensor]:
    """A random order of every matrix's input channels that may be permuted."""
    orders = {}
    for name, channels in find_channels(model, survey(model).prunable).items():
        size = channels.count // channels.parts
        sets = [
            torch.cat([torch.randperm(size) + i * size for i in range(channels.parts)])
            for _ in range(channels.experts or 1)
        ]
        orders[name] = sets[0] if channels.experts is None else torch.stack(sets)
    return orders


def kept(model: nn.Module, name: str) -> float:
    """The magnitude that 2:4 keeps."""
    return float(find_matrix(model, name).rows.detach().abs().reshape(-1, 4).topk(2, 1).values.sum())


@torch.no_grad()
def check(model: nn.Module, permute: Callable[[nn.Module], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Permuted, the columns stand in that order and the outputs are the same; permuted back, the bits are."""
    wanted, before = model(X), state(model)
    rows = {name: matrix.rows.clone() for name, matrix in survey(model).prunable.items()}
    permutations = permute(model)
    for name, order in permutations.items():
        found = find_matrix(model, name).rows
        assert torch.equal(found, rows[name].gather(-1, order.unsqueeze(-2).expand(found.shape)))
    assert float((model(X) - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())
    apply_permutations_(model, invert_permutations(permutations))
    assert same_bits(state(model), before)
    return permutations


@every_model
def test_outputs_stay_whatever_the_order(kind: str) -> None:
    model = built(kind)
    permutations = shuffled(model)
    assert {name: tuple(order.shape) for name, order in permutations.items()} == MODELS[kind][1]
    check(model, lambda model: (apply_permutations_(model, permutations), permutations)[1])


@every_model
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_order_that_is_chosen_keeps_more(kind: str, calibrated: bool) -> None:
    model, before = built(kind), built(kind)
    before.load_state_dict(model.state_dict())
    how: Any = {"calibration": [X]} if calibrated else {}
    permutations = check(model, lambda model: permute_channels_(model, "2:4", on_misfit="skip", **how))
    assert sorted(permutations) == sorted(MODELS[kind][1])
    apply_permutations_(model, permutations)
    for name in () if calibrated else permutations:
        assert kept(model, name) > kept(before, name)
    assert all(NMPattern("2:4").is_valid(mask) for mask in prune(model, "magnitude", on_misfit="skip").values())


def test_each_expert_has_an_order_of_its_own() -> None:
    (order,) = permute_channels_(built("experts"), "2:4").values()
    assert len({tuple(one.tolist()) for one in order}) == 4


def test_experts_without_tokens_go_by_magnitude() -> None:
    model, plain = built("experts"), built("experts")
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for one in (model, plain):
            one.gate.bias[2] = -100.0
    with pytest.warns(UserWarning, match=r"'experts.down_proj': no token came to 1 of 4 experts, permuted by mag.*: 2"):
        (found,) = permute_channels_(model, "2:4", calibration=[X]).values()
    (expected,) = permute_channels_(plain, "2:4").values()
    assert [bool(one.equal(other)) for one, other in zip(found, expected, strict=True)] == [False, False, True, False]


@pytest.mark.parametrize(
    "order", [torch.arange(24), torch.zeros(4, 24, dtype=torch.long), torch.arange(24).repeat(3, 1)]
)
def test_orders_of_experts_are_checked(order: Tensor) -> None:
    model = built("experts")
    before = state(model)
    with pytest.raises(ConfigError, match=r"'experts.down_proj': not a permutation of each of its 4 experts' 24 input"):
        apply_permutations_(model, {"experts.down_proj": order})
    assert same_bits(state(model), before)


def test_values_of_attention_stay_in_their_heads() -> None:
    swapped = torch.arange(16)
    swapped[[7, 8]] = swapped[[8, 7]]
    with pytest.raises(
        ConfigError, match=r"'attention.out_proj': a permutation that moves channels between its 2 heads"
    ):
        apply_permutations_(built("attention"), {"attention.out_proj": swapped})


MOE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 20}
QWEN = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
GPT_OSS = {"intermediate_size": 24, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.slow  # it takes long to import
@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("Qwen2Moe", QWEN, {"mlp.experts.down_proj": (4, 24), "mlp.shared_expert.down_proj": (24,)}),
        ("GptOss", GPT_OSS, {"mlp.experts.down_proj": (4, 24)}),
    ],
)
@torch.no_grad()
def test_experts_of_transformers(name: str, sizes: dict[str, int], expected: dict[str, tuple[int, ...]]) -> None:
    """Their fast products know no float64, in which blocks are tried; heads that share values are left alone."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**MOE, **sizes)
    model, ids = getattr(transformers, f"{name}ForCausalLM")(config).eval(), torch.arange(10)[None]
    how = config._experts_implementation
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    wanted = model(ids).logits
    permutations = permute_channels_(model, "2:4", exclude=["lm_head"], on_misfit="skip")
    assert {one: tuple(order.shape) for one, order in permutations.items()} == {
        f"model.layers.0.{one}": shape for one, shape in expected.items()
    }
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert config._experts_implementation == how


# What cannot be permuted is left alone, and said


class Shared(nn.Module):
    """Two of a kind, of which something is shared."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second = (MODELS[kind][0]() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def tie(kind: str, what: str, *, memory: bool = False) -> nn.Module:
    model = Shared(kind).double().eval()
    module, _, attribute = what.rpartition(".")
    first, second = (one.get_submodule(module) for one in (model.first, model.second))
    if memory:
        setattr(second, attribute, nn.Parameter(getattr(first, attribute).detach()))
    else:
        setattr(second, attribute, getattr(first, attribute))
    return model


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("attention", "attention.in_proj_weight"),
        ("attention", "attention.in_proj_bias"),
        ("attention", "attention.out_proj.weight"),
        ("Conv1D", "mlp.c_fc.weight"),
        ("Conv1D", "mlp.c_fc.bias"),
        ("experts", "experts.down_proj"),
        ("experts", "experts.up_proj_bias"),
    ],
)
def test_what_is_tied_is_not_permuted_in_one_place(kind: str, what: str, memory: bool) -> None:
    model = tie(kind, what, memory=memory)
    before = state(model)
    readers = [name for name in survey(model).prunable if name.split(".")[-2] == what.split(".")[0]]
    with pytest.warns(UserWarning, match="stay where they are: weights are shared with another layer") as warned:
        assert find_channels(model, readers) == {}
    assert len(warned) == (1 if what in ("attention.out_proj.weight", "experts.down_proj") and not memory else 2)
    assert same_bits(state(model), before)


def test_a_container_that_two_blocks_share() -> None:
    """No layer in it has more than one parent."""
    wrapped = nn.Module()
    wrapped.proj = nn.Linear(16, 24)
    ends = [nn.Linear(24, 16) for _ in range(2)]
    blocks = []
    for end in ends:
        block = nn.Module()
        block.net = nn.ModuleList([wrapped, nn.GELU(), end])
        blocks.append(block)
    model = nn.ModuleList(blocks)
    with pytest.warns(UserWarning, match="weights are shared with another layer"):
        assert find_channels(model, ["0.net.2", "1.net.2"]) == {}


@pytest.mark.parametrize("kind", ["attention", "experts", "Conv1D"])
def test_a_block_that_is_used_twice_is_permuted_once(kind: str) -> None:
    block = built(kind)
    model = nn.Sequential(block, nn.LayerNorm(16), block).double().eval()
    permutations = check(model, lambda model: permute_channels_(model, "2:4"))
    assert sorted(permutations) == sorted(f"0.{name}" for name in MODELS[kind][1])


class Telling(Units):
    """Shows others its hidden units."""

    def forward(self, x: Tensor) -> Any:
        hidden = F.gelu(self.c_fc(x))
        return {"out": self.c_proj(hidden), "more": [hidden]}


class Untold(Experts):
    """Gates and values side by side, without saying so."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.is_concatenated = False
        try:
            return super().forward(x, index, weights)
        finally:
            self.is_concatenated = True


class Odd(nn.MultiheadAttention):
    def forward(self, query: Tensor, *arguments: Any, **how: Any) -> Any:
        return super().forward(query.cumsum(-1), *arguments, **how)[0].cumsum(-1) + self.in_proj_bias[-16:].cumsum(-1)


@pytest.mark.parametrize(
    ("model", "reader", "said"),
    [
        (lambda: named(mlp=Telling(nn.Linear(16, 24), nn.Linear(24, 16))), "mlp.c_proj", "the outputs of its Telling"),
        (lambda: named(attention=Odd(16, 2)), "attention.out_proj", "the outputs of its Odd depend on their order"),
        (
            lambda: Mixture(Experts(gated=False, idle=1)),
            "experts.down_proj",
            "its Experts does not use expert 3 of 'up_proj' when it is tried out alone",
        ),
        (lambda: Mixture(Untold(gated=True)), "experts.down_proj", "the outputs of its Untold depend on their order"),
    ],
)
def test_blocks_that_cannot_be_permuted_are_named(model: Callable[[], nn.Module], reader: str, said: str) -> None:
    found = model()
    before = state(found)
    with pytest.warns(UserWarning, match=f"'{reader}': its input channels stay where they are: {said}"):
        assert find_channels(found, [reader]) == {}
    assert same_bits(state(found), before)


def test_a_report_says_what_stays() -> None:
    said: list[str] = []
    found = permute_channels_(built("encoder"), "2:4", tell=said.append)
    assert found.best == ()
    assert found.fixed == tuple(
        f"layers.{i}.{name}" for i in range(2) for name in ("self_attn.in_proj_weight", "linear1")
    )
    assert said == [
        "permuted the input channels of 4 layers (of 8)\n"
        "those of others cannot move, or are not known to: 'layers.0.self_attn.in_proj_weight', 'layers.0.linear1', "
        "'layers.1.self_attn.in_proj_weight' and 1 more"
    ]
    model = built("encoder")
    permute_channels_(model, "2:4")
    again = permute_channels_(model, "2:4", tell=said.append)
    assert not again
    assert len(again.best) == 4
    assert "these stand in the best order already: 'layers.0.linear2'" in said[-1]


def test_scores_of_experts_have_to_be_finite() -> None:
    model = built("experts")
    with torch.no_grad():
        model.experts.down_proj[3, 0, 0] = float("nan")
    before = state(model)
    with pytest.raises(PatternError, match=r"'experts.down_proj': scores are not finite"):
        permute_channels_(model, "2:4")
    assert all(torch.equal(tensor.nan_to_num(), before[name].nan_to_num()) for name, tensor in state(model).items())
