"""The diffusion transformer: how it starts, what is set on it, and which files it is read from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

pytest.importorskip("diffusers")

from diffusers import DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from small_diffusion import ARGS, awake, dit

from maskllm4v.checkpoints.masks import load_state, save_dense
from maskllm4v.sparsity.survey import prunable_linears
from maskllm4v.tasks.diffusion.classic import to_classic
from maskllm4v.tasks.diffusion.dit import blocks, build_dit, condition, read_config, read_weights
from maskllm4v.tasks.diffusion.settings import DiTSettings
from maskllm4v.utils.errors import CheckpointError, ConfigError
from maskllm4v.utils.rng import torch_seed


def settings(**values: Any) -> DiTSettings:
    return DiTSettings(**{"name": "DiTTransformer2DModel", "args": ARGS, **values})


def outputs(model: nn.Module, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    with torch.no_grad():
        return model(images, torch.tensor([0, 500, 999])[:count], torch.tensor([0, 5, 10])[:count], return_dict=False)[
            0
        ]


def same(found: Any, expected: Any) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# Initial weights


def test_output_is_zero_at_first_and_blocks_change_nothing() -> None:
    model = build_dit(settings(), 0)
    assert not outputs(model).any()
    hidden = torch.randn(3, 4, 16)
    for block in blocks(model):
        kept = block(hidden, timestep=torch.tensor([0, 500, 999]), class_labels=torch.tensor([0, 5, 10]))
        assert torch.equal(kept, hidden)
    awake(model)
    assert outputs(model).abs().min() > 0


def test_all_other_first_weights_are_diffusers_own() -> None:
    """Zero are the blocks' modulation and both layers of the output, biases too."""
    model = build_dit(settings(), 3)
    with torch.random.fork_rng():
        torch.manual_seed(torch_seed(3, "weights"))
        own = DiTTransformer2DModel(**ARGS).state_dict()
    for name, value in model.state_dict().items():
        zero = name.startswith("proj_out_") or ".norm1.linear." in name
        assert own[name].any(), name
        assert value.equal(torch.zeros_like(value) if zero else own[name]), name


def test_seed_gives_the_weights_and_nothing_else_is_drawn() -> None:
    state = torch.get_rng_state()
    first, again, other = (build_dit(settings(), seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert same(first, again)
    assert same(first, build_dit(settings(), 0).state_dict())
    assert not torch.equal(first["transformer_blocks.0.attn1.to_q.weight"], other["transformer_blocks.0.attn1.to_q.weight"])  # fmt: skip  # noqa: E501


def test_model_is_in_evaluation_mode() -> None:
    assert not any(module.training for module in build_dit(settings(), 0).modules())


# What neither weights nor configuration say


@pytest.mark.parametrize("shift", [0, 1])
def test_frequencies_of_every_block(shift: Any) -> None:
    model = build_dit(settings(freq_shift=shift), 0)
    steps = torch.tensor([700])
    waves = 10_000.0 ** (-torch.arange(128, dtype=torch.float64) / (128 - shift))
    wanted = torch.cat([(700 * waves).cos(), (700 * waves).sin()])  # cosines first
    for block in blocks(model):
        found = block.norm1.emb.time_proj(steps)[0]
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-3)


def test_attention_of_every_block() -> None:
    explicit, fused = (awake(build_dit(settings(fused_attention=fused), 0)) for fused in (False, True))
    assert {type(block.attn1.processor) for block in blocks(explicit)} == {AttnProcessor}
    assert {type(block.attn1.processor) for block in blocks(fused)} == {AttnProcessor2_0}
    torch.testing.assert_close(outputs(explicit), outputs(fused), rtol=1e-4, atol=1e-5)


def test_layers_that_stay_dense() -> None:
    model = build_dit(settings(), 0)
    body = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"]
    for adaln, names in ((True, ["norm1.linear", *body]), (False, body)):
        found = prunable_linears(model, exclude=settings(adaln=adaln).excluded_layers)
        assert list(found) == [name for name in dict(model.named_modules()) if name in found]
        assert set(found) == {f"transformer_blocks.{i}.{name}" for i in range(2) for name in names}
    assert "transformer_blocks.1.attn1.*" in settings(exclude=["transformer_blocks.1.attn1.*"]).excluded_layers


def test_conditions_run_the_modulation_layers_alone_on_their_own_inputs() -> None:
    model, seen = dit(), {}

    def note(name: str) -> Any:
        return lambda _, inputs: seen.setdefault(name, []).append(inputs[0])

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".norm1.emb." not in name:
            module.register_forward_pre_hook(note(name))
    outputs(model)
    whole, seen = seen, {}
    with torch.no_grad():
        condition(model, (torch.tensor([0, 500, 999]), torch.tensor([0, 5, 10])))
    assert list(seen) == ["transformer_blocks.0.norm1.linear", "transformer_blocks.1.norm1.linear"]
    assert all(torch.equal(seen[name][0], whole[name][0]) for name in seen)


# Bad arguments


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"depth": 3}, "unexpected keyword argument 'depth'"),
        ({"norm_type": "layer_norm"}, "'layer_norm'"),
        ({"num_embeds_ada_norm": None}, "cannot be None"),
        ({"num_attention_heads": "two"}, "do not fit 'DiTTransformer2DModel'"),
        ({"attention_head_dim": 3, "num_attention_heads": 1}, "do not fit 'DiTTransformer2DModel'"),
        ({"patch_size": 0}, "do not fit 'DiTTransformer2DModel'"),
        ({"patch_size": 3}, "model.args: patch_size does not divide sample_size"),
        ({"dropout": 0.1}, "model.args.dropout would do nothing: models are trained in evaluation mode"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_dit(settings(args={**ARGS, **changes}), 0)
    assert str(caught.value).startswith("model.args")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "diffusers.models.transformers.dit_transformer_2d", None)
    for call in (lambda: build_dit(settings(), 0), lambda: read_config(tmp_path)):
        with pytest.raises(ConfigError, match=r"needs diffusers: pip install 'maskllm4v\[diffusion\]'"):
            call()


# Files


def one_block() -> nn.Module:
    """A classic DiT has one embedder; so has a model of one block."""
    return dit(num_layers=1)


@pytest.mark.parametrize("inside", ["", "transformer"])
@pytest.mark.parametrize("safe", [True, False])
def test_folder_of_diffusers(inside: str, safe: bool, tmp_path: Path) -> None:
    model = one_block()
    assert isinstance(model, DiTTransformer2DModel)
    model.save_pretrained(tmp_path / inside, safe_serialization=safe)
    assert same(read_weights(tmp_path), model.state_dict())
    other = build_dit(settings(args=read_config(tmp_path)), 9)
    load_state(other, read_weights(tmp_path), "there")
    torch.testing.assert_close(outputs(other), outputs(model))


def classic(model: nn.Module, path: Path) -> None:
    state = to_classic(model.state_dict(), 8)
    if path.suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)


FILES = {
    "dense.safetensors": lambda model, path: save_dense(path, model, "DiTTransformer2DModel"),
    "plain.safetensors": lambda model, path: save_file(model.state_dict(), path),
    "classic.safetensors": classic,
    "classic.pt": classic,
}


@pytest.mark.parametrize("name", FILES)
def test_files_in_any_format(name: str, tmp_path: Path) -> None:
    model = one_block()
    FILES[name](model, tmp_path / name)
    assert same(read_weights(tmp_path / name), model.state_dict())


def test_configuration_of_an_older_folder(tmp_path: Path) -> None:
    """diffusers' Transformer2DModel, as which the published weights were saved, has more arguments."""
    others = {"cross_attention_dim": None, "num_vector_embeds": None, "only_cross_attention": False}
    config = {"_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0.dev0", **ARGS, **others}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == ARGS
    (tmp_path / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 768}))
    with pytest.raises(ConfigError, match="cross_attention_dim"):
        build_dit(settings(args=read_config(tmp_path)), 0)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("", None, "is no diffusers folder: transformer/diffusion_pytorch_model.safetensors is missing"),
        ("absent.pt", None, "is missing"),
        ("absent.safetensors", None, "is missing"),
        ("damaged.safetensors", b"\x10", "is damaged"),
        ("damaged.pt", b"text", "is damaged or"),
    ],
)
def test_unusable_weights_are_named(name: str, content: bytes | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / name if name else tmp_path
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_weights_of_something_else(tmp_path: Path) -> None:
    torch.save({"head.weight": torch.zeros(2)}, tmp_path / "vit.pt")
    with pytest.raises(CheckpointError, match="holds no DiT in its classic names"):
        read_weights(tmp_path / "vit.pt")
    with pytest.raises(CheckpointError, match=r"is no diffusers folder: transformer/config\.json is missing"):
        read_config(tmp_path)
