"""Dense models by name, and where they are computed."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from maskllm4v.config import ModelSettings
from maskllm4v.devices import hardware, pick_device
from maskllm4v.errors import CheckpointError, ConfigError
from maskllm4v.models import build_model, image_settings

SMALL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 2, "num_heads": 4}


def settings(name: str = "VisionTransformer", **changes: Any) -> ModelSettings:
    return ModelSettings(**{"name": name, "args": SMALL, **changes})


def small(seed: int = 0, **changes: Any) -> nn.Module:
    return build_model(settings(**changes), seed, pretrained=False)


# Building


@pytest.mark.parametrize("name", ["VisionTransformer", "vit_tiny_patch16_224"])
def test_model_has_the_wanted_shape_and_is_in_evaluation_mode(name: str) -> None:
    model = small(name=name)
    assert isinstance(model, timm.models.VisionTransformer)
    assert (model.embed_dim, len(model.blocks), model.patch_embed.patch_size) == (32, 2, (2, 2))
    assert not any(module.training for module in model.modules())
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_same_seed_same_weights_whatever_torch_drew_before() -> None:
    first = small(3).state_dict()
    torch.manual_seed(99)
    torch.rand(5)
    second = small(3).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_other_seed_other_weights() -> None:
    first, second = small(3).state_dict(), small(4).state_dict()
    drawn = [key for key in first if key.endswith((".qkv.weight", ".fc1.weight", "pos_embed", "proj.weight"))]
    assert len(drawn) == 8
    assert not any(torch.equal(first[key], second[key]) for key in drawn)


@pytest.mark.parametrize("args", [SMALL, {"nonsense": 1}])
def test_torchs_generator_is_left_alone(args: dict[str, Any]) -> None:
    state = torch.get_rng_state()
    try:
        small(args=args)
    except ConfigError:
        assert args is not SMALL
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["VisionTransformer", "vit_tiny_patch16_224"])
def test_fused_attention_is_set_in_every_module(name: str) -> None:
    def flags(**how: Any) -> list[bool]:
        return [module.fused_attn for module in small(name=name, **how).modules() if hasattr(module, "fused_attn")]

    assert flags(fused_attention=False) == [False, False]
    assert flags(fused_attention=True) == [True, True]
    assert flags() == [True, True]


def test_both_attentions_compute_the_same() -> None:
    fused, plain = small(fused_attention=True), small(fused_attention=False)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(fused(x), plain(x))


# Mistakes


def config_error(pretrained: bool = False, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build_model(settings(**changes), 0, pretrained=pretrained)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "close"), [("vit_tiny_patch16_223", "vit_tiny_patch16_224"), ("resnet_50", "resnet50")]
)
def test_unknown_name_is_answered_with_close_ones(name: str, close: str) -> None:
    message = config_error(name=name)
    assert message.startswith(f"model.name is {name!r}, which timm does not know; close: ")
    named = message.partition("close: ")[2].split(", ")
    assert close in named
    assert len(named) <= 5
    assert all(timm.is_model(one) for one in named)


def test_misspelt_name_is_answered_with_the_right_one() -> None:
    assert "deit_small_patch16_224" in config_error(name="diet_small_patch16_224")


def test_strange_name_has_no_close_one() -> None:
    assert config_error(name="qqqqqqqqq") == "model.name is 'qqqqqqqqq', which timm does not know; close: none"


@pytest.mark.parametrize("name", ["", "*", "vit*", "[", "hf_hub:"])
def test_odd_name_is_a_config_error(name: str) -> None:
    assert config_error(name=name).startswith(f"model.name is {name!r}")


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ({**SMALL, "embed_dims": 32}, "embed_dims"),
        ({**SMALL, "num_heads": 5}, "num_heads"),
        ({**SMALL, "depth": "two"}, ""),
        ({**SMALL, "global_pool": "most"}, ""),
        ({**SMALL, "embed_dim": -32}, ""),
        ({**SMALL, "norm_layer": "nonsense"}, ""),
        ({**SMALL, "num_heads": 0}, ""),
        ({**SMALL, "patch_size": 0}, ""),
    ],
    ids=["unknown", "division", "text", "choice", "negative", "norm", "no heads", "no patch"],
)
@pytest.mark.parametrize("name", ["VisionTransformer", "vit_tiny_patch16_224"])
def test_bad_arguments_are_a_config_error(name: str, args: dict[str, Any], word: str) -> None:
    message = config_error(name=name, args=args)
    assert message.startswith(f"model.args do not fit {name!r}: ")
    assert word in message


def test_plain_vit_has_no_pretrained_weights() -> None:
    assert "no pretrained weights" in config_error(pretrained=True)


@pytest.mark.parametrize(
    "error",
    [OSError("no route to huggingface.co\nand more"), RuntimeError("no weights for\nthis model"), OSError()],
    ids=["network", "none", "no text"],
)
def test_weights_that_cannot_be_had_are_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(CheckpointError, match=r"^no pretrained weights for 'vit_tiny_patch16_224'") as caught:
        build_model(settings("vit_tiny_patch16_224"), 0, pretrained=True)
    message = str(caught.value)
    assert str(error).partition("\n")[0] in message
    assert "\n" not in message


@pytest.mark.parametrize("pretrained", [True, False])
def test_timm_is_asked_for_weights_as_wanted(pretrained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def note(*args: Any, **how: Any) -> nn.Module:
        seen.append((args, how))
        return nn.Identity()

    monkeypatch.setattr(timm, "create_model", note)
    build_model(settings("vit_tiny_patch16_224", args={"depth": 3}), 0, pretrained=pretrained)
    assert seen == [(("vit_tiny_patch16_224",), {"pretrained": pretrained, "depth": 3})]


# What a model's images look like


def test_image_settings_of_a_timm_model() -> None:
    found = image_settings(settings("vit_tiny_patch16_224", args={}))
    assert found["input_size"] == (3, 224, 224)
    assert found["mean"] == (0.5, 0.5, 0.5)
    assert found["std"] == (0.5, 0.5, 0.5)
    assert found["interpolation"] == "bicubic"
    assert found["crop_pct"] == 0.9


@pytest.mark.parametrize(
    ("args", "size"),
    [
        ({"img_size": 96}, (3, 96, 96)),
        ({"img_size": [64, 128]}, (3, 64, 128)),
        ({"img_size": 96, "in_chans": 1}, (1, 96, 96)),
    ],
)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "VisionTransformer"])
def test_image_size_of_the_arguments_wins(name: str, args: dict[str, Any], size: tuple[int, int, int]) -> None:
    assert image_settings(settings(name, args=args))["input_size"] == size


def test_image_settings_leave_timms_own_alone() -> None:
    image_settings(settings("vit_tiny_patch16_224", args={"img_size": 96}))
    assert image_settings(settings("vit_tiny_patch16_224", args={}))["input_size"] == (3, 224, 224)


def test_image_settings_differ_between_models() -> None:
    assert image_settings(settings("deit_tiny_patch16_224", args={}))["mean"] == (0.485, 0.456, 0.406)


# Devices


@pytest.mark.parametrize(("available", "kind"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_cuda_where_it_is(available: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert pick_device("auto").type == kind


@pytest.mark.parametrize("available", [True, False])
def test_cpu_is_the_cpu(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "CPU", "cuda:-1"])
def test_unknown_device_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^runtime\.device is ") as caught:
        pick_device(name)
    assert repr(name) in str(caught.value)
    assert "allowed: auto, cpu, cuda" in str(caught.value)


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_cuda_without_cuda_is_a_config_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"^runtime\.device is '{name}', but torch finds no CUDA device here$"):
        pick_device(name)


def test_cuda_of_a_number_that_is_not_there_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match=r"runtime\.device is 'cuda:1'"):
        pick_device("cuda:1")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="has MPS")
def test_mps_without_mps_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.device is 'mps'"):
        pick_device("mps")


def test_device_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert hardware(torch.device("cuda", 1)) == "GPU 1"
    words = hardware(torch.device("cpu"))
    assert words
    assert words == words.strip()
    assert ":" not in words
    assert "\n" not in words
