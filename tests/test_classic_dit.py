"""DiT's classic checkpoints in diffusers' model, against a DiT written from the paper; and back."""

from __future__ import annotations

import pytest
import torch

from maskllm4v.sparsity.patterns import NMPattern

pytest.importorskip("diffusers")

from classic_dit import SMALL, Size, batch, classic, loaded, outputs, paper, refusal, same, sizes

from maskllm4v.tasks.diffusion.classic import (
    classic_config,
    from_classic,
    is_classic,
    set_freq_shift,
    to_classic,
)


@sizes
def test_diffusers_computes_the_paper_s_model(size: Size) -> None:
    state, inputs = classic(size), batch(size)
    expected = paper(state, size, *inputs)
    assert expected.shape[1] == size.channels * (1 + size.sigma)
    model = loaded(state, size)
    set_freq_shift(model, 0)
    assert (outputs(model, *inputs) - expected).abs().max() < 1e-10
    set_freq_shift(model, 1)
    assert (outputs(model, *inputs) - expected).abs().max() > 1e-3


def test_freq_shift_of_diffusers_is_one() -> None:
    model, inputs = loaded(classic(SMALL), SMALL), batch(SMALL)
    expected = outputs(model, *inputs)
    set_freq_shift(model, 1)
    assert torch.equal(outputs(model, *inputs), expected)


def test_epsilon_of_diffusers_is_another() -> None:
    state, inputs = classic(SMALL), batch(SMALL)
    model = loaded(state, SMALL, norm_eps=1e-5)
    set_freq_shift(model, 0)
    assert 1e-8 < (outputs(model, *inputs) - paper(state, SMALL, *inputs)).abs().max() < 1e-3


def test_label_of_none_is_the_last() -> None:
    """The pipeline asks for it by its number; the training drops labels to it."""
    model, (latents, times, labels) = loaded(classic(SMALL), SMALL), batch(SMALL)
    none = torch.full_like(labels, SMALL.classes)
    expected = outputs(model, latents, times, none)
    assert not torch.allclose(outputs(model, latents, times, torch.zeros_like(labels)), expected, atol=1e-3)
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 1.0
    assert torch.equal(outputs(model.train(), latents, times, labels), expected)


@sizes
def test_config(size: Size) -> None:
    config = loaded(classic(size), size).config
    found = [config[key] for key in ("in_channels", "sample_size", "patch_size", "num_layers", "num_embeds_ada_norm")]
    assert found == [size.channels, size.sample, size.patch, size.blocks, size.classes]
    assert config["out_channels"] == size.channels * (1 + size.sigma)
    assert (config["num_attention_heads"], config["attention_head_dim"]) == (size.heads, size.width // size.heads)


@pytest.mark.parametrize("heads", [0, -2, 5])
def test_heads_that_do_not_fit(heads: int) -> None:
    message = refusal(lambda: classic_config(classic(SMALL), heads, "x.pt"))
    assert message == f"x.pt: {heads} heads do not divide the width 24"


@sizes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_round_trips(size: Size, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in classic(size).items()}
    own = from_classic(state)
    assert own.keys() == loaded(classic(size), size).state_dict().keys()
    back = to_classic(own, size.sample)
    assert same(back, state)
    assert same(from_classic(back), own)


def test_copies_take_no_memory() -> None:
    state = classic(SMALL)
    before = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert {tensor.untyped_storage().data_ptr() for tensor in from_classic(state).values()} < before


def test_pruned_weights_pass() -> None:
    state = classic(SMALL)
    for layer in ("blocks.0.attn.qkv", "blocks.1.mlp.fc1"):
        state[f"{layer}.weight"] *= NMPattern(2, 4).topn_mask(state[f"{layer}.weight"].float())
    own = from_classic(state)
    for layer in ("0.attn1.to_q", "0.attn1.to_k", "0.attn1.to_v", "1.ff.net.0.proj"):
        NMPattern(2, 4).validate(own[f"transformer_blocks.{layer}.weight"] != 0, layer)
    assert same(to_classic(own, SMALL.sample), state)


def test_which_is_classic() -> None:
    state = classic(SMALL)
    assert is_classic(state)
    assert all(is_classic({name: t for name, t in state.items() if name != without}) for without in state)
    assert not is_classic(from_classic(state))
    assert not is_classic({})
    assert not is_classic({"blocks.0.attn.qkv.weight": torch.zeros(3, 1), "pos_embed": torch.zeros(1)})  # timm's ViT
