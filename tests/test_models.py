"""Dense models by name, and the images that they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

from maskllm4v.tasks.classification.models import build_model, image_settings, num_classes
from maskllm4v.tasks.classification.settings import TimmSettings
from maskllm4v.utils.errors import CheckpointError, ConfigError

SMALL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 2, "num_heads": 4}


def settings(name: str = "VisionTransformer", **changes: Any) -> TimmSettings:
    return TimmSettings(**{"name": name, "args": SMALL, **changes})


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


INPUTS = {
    "mean": ([0.1, 0.2, 0.3], (0.1, 0.2, 0.3)),
    "std": ([0.2], (0.2, 0.2, 0.2)),
    "crop_pct": (1.0, 1.0),
    "crop_mode": ("squash", "squash"),
    "interpolation": ("bilinear", "bilinear"),
}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet50", "VisionTransformer"])
@pytest.mark.parametrize("key", INPUTS)
def test_input_overrules_one_thing(name: str, key: str) -> None:
    value, resolved = INPUTS[key]
    before = image_settings(settings(name, args={}))
    assert before[key] != resolved
    assert image_settings(settings(name, args={}, input={key: value})) == {**before, key: resolved}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet50", "VisionTransformer"])
def test_input_size_overrules_timms_and_the_arguments(name: str) -> None:
    before = image_settings(settings(name, args={}))
    wanted = {**before, "input_size": (3, 96, 96)}
    assert image_settings(settings(name, args={}, input={"img_size": 96})) == wanted
    assert image_settings(settings(name, args={"img_size": 64}, input={"img_size": 96})) == wanted


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet50", "VisionTransformer"])
def test_grey_models_take_the_colours_average(name: str) -> None:
    colours = image_settings(settings(name, args={}))
    grey = image_settings(settings(name, args={"in_chans": 1}))
    assert grey["input_size"] == (1, *colours["input_size"][1:])
    for key in ("mean", "std"):
        assert grey[key] == pytest.approx((sum(colours[key]) / 3,))
    own = image_settings(settings(name, args={"in_chans": 1}, input={"mean": [0.25], "std": [0.75]}))
    assert (own["mean"], own["std"]) == ((0.25,), (0.75,))


@pytest.mark.parametrize(("key", "args", "channels"), [("mean", {}, 3), ("std", {"in_chans": 1}, 1)])
def test_statistics_of_other_channels_are_a_config_error(key: str, args: dict[str, Any], channels: int) -> None:
    with pytest.raises(ConfigError, match=rf"model.input.{key} has 2 values, but images have {channels} channels"):
        image_settings(settings(args=args, input={key: [0.5, 0.5]}))


@pytest.mark.parametrize(
    ("name", "args", "count"),
    [
        ("VisionTransformer", {}, 1000),
        ("VisionTransformer", SMALL, 10),
        ("vit_tiny_patch16_224", {}, 1000),
        ("vit_tiny_patch16_224", {"num_classes": 37}, 37),
        ("vit_tiny_patch16_224.augreg_in21k", {}, 21843),
    ],
)
def test_number_of_classes_is_the_models(name: str, args: dict[str, Any], count: int) -> None:
    assert num_classes(settings(name, args=args)) == count


@pytest.mark.parametrize("ask", [image_settings, num_classes])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_223", "vit_tiny_patch16_224.nonsense"])
def test_unknown_models_have_no_settings(ask: Callable[[TimmSettings], Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.name is '{name}', which timm does not know"):
        ask(settings(name, args={}))


# The convolutional stem


STEM = {"channels": [4, 16, 32], "strides": [1, 2, 2]}
STEMMED = {key: value for key, value in SMALL.items() if key != "patch_size"}


@pytest.mark.parametrize("channels", [1, 3])
def test_stem_takes_the_patch_embeddings_place(channels: int) -> None:
    model = small(args={**STEMMED, "in_chans": channels}, stem=STEM)
    convolutions = [module for module in model.patch_embed.modules() if isinstance(module, nn.Conv2d)]
    found = [(conv.in_channels, conv.out_channels, conv.stride) for conv in convolutions]
    assert found == [(channels, 4, (1, 1)), (4, 16, (2, 2)), (16, 32, (2, 2))]
    x = torch.zeros(2, channels, 8, 8)
    assert model.patch_embed(x).shape == (2, 4, 32)  # 8 pixels / 4, squared
    assert model(x).shape == (2, 10)


def test_stem_is_seeded() -> None:
    first, second, other = (small(seed, args=STEMMED, stem=STEM).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    key = "patch_embed.backbone.0.conv.weight"
    assert not torch.equal(first[key], other[key])


def test_stem_of_another_width_is_a_config_error() -> None:
    assert "32" in config_error(args=STEMMED, stem={"channels": [4, 16], "strides": [2, 2]})
    assert "patch_size" in config_error(args=SMALL, stem=STEM)


def test_stem_of_a_timm_model_is_a_config_error() -> None:
    message = config_error(name="vit_tiny_patch16_224", args=STEMMED, stem=STEM)
    assert message == "model.stem is for VisionTransformer and Eva only, not for 'vit_tiny_patch16_224'"
