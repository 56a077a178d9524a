"""Each of transformers' detectors, tiny and random, from a folder: pruned, updated, masks learned, evaluated, saved."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny_detectors
import torch
from tiny_detectors import QUERIES, SIZE
from torch import Tensor, nn

from maskllm4v import apply_masks_, fold_, learn_masks, make_learnable, prune, update_weights_
from maskllm4v.checkpoints.masks import MaskCheckpoint, load_masks, save_masks
from maskllm4v.config import LearningSettings
from maskllm4v.data.annotated import NONE
from maskllm4v.sparsity.parameters import learnable_masks
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.tasks.base import learning_mode
from maskllm4v.tasks.detection.settings import LEARNED, TRANSFORMERS, DetectorSettings
from maskllm4v.utils.errors import ConfigError

pytest.importorskip("transformers")

SELECTED = [name for name in TRANSFORMERS if name not in LEARNED]
# What stays dense, whatever its name in full: heads, what chooses places, and what DETR multiplies zeros by.
HEADS = ("class_", "bbox_", "query_pos", "ref_point", "enc_output", "enc_score", "enc_out_", "lqe_layers")
CHOICE = ("sampling_offsets", "attention_weights")
ZEROS = {"DetrForObjectDetection": "decoder.layers.0.self_attn.v_proj"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models' folders by name, and the prepared data."""
    return tmp_path_factory.mktemp("detectors")


def opened(name: str, folders: Path, **model: Any) -> Any:
    if not (folders / name).exists():
        tiny_detectors.save(name, folders / name)
    return tiny_detectors.task(name, folders / name, folders / "data", **model)


def some(task: Any) -> Any:
    return next(task.train_batches(seed=0, batch_size=4, steps=1))


def run(task: Any, model: nn.Module, batch: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(task.forward(model, batch))


@pytest.mark.filterwarnings("ignore:masks cover only")  # of models as small as these, mostly convolutions
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_from_a_folder_to_masks_in_a_file(name: str, folders: Path, tmp_path: Path) -> None:
    task = opened(name, folders)
    dense = task.build_model(0, pretrained=True)
    places = [weight.untyped_storage().data_ptr() for weight in dense.parameters()]
    assert len(set(places)) == len(places)  # products are told apart by the memory that weights lie in
    batch = some(task)
    own = run(task, dense, batch)
    assert own["boxes"].shape == (4, QUERIES, 4)

    layers: dict[str, Any] = {"exclude": task.model.excluded_layers}
    masks = prune(copy.deepcopy(dense), "wanda", calibration=task.calibration(16, 0), **layers)
    linear = {layer for layer, module in dense.named_modules() if isinstance(module, nn.Linear)}
    stays = (*HEADS, *CHOICE, ZEROS.get(name, "bbox_"))
    assert masks.keys() == {layer for layer in linear if not any(part in layer for part in stays)}

    updated = apply_masks_(copy.deepcopy(dense), masks, "2:4")
    before = run(task, updated, batch)
    symmetric = (
        pytest.warns(UserWarning, match="decoder.layers.*not the same tokens") if name in SELECTED else nullcontext()
    )
    with symmetric:
        update_weights_(updated, calibration=task.calibration(16, 0), dense=dense)
    after = run(task, updated, batch)
    apart = [float(task.distillation_loss(found, own, 1.0, batch)) for found in (before, after)]
    assert apart[1] != apart[0]

    learned = make_learnable(copy.deepcopy(dense), masks, pattern="2:4")
    start = {layer: mask.logits.detach().clone() for layer, mask in learnable_masks(learned).items()}
    settings = LearningSettings(steps=2, batch_size=4, accumulate=2, lr=0.1, distillation=0.5, log_every=1)
    result = learn_masks(learned, task, settings)
    assert all(not torch.equal(start[layer], mask.logits) for layer, mask in learnable_masks(learned).items())

    assert task.pictures(learned)["predictions"].ndim == 3
    metrics = task.evaluate(learned, dense)
    assert 0 <= metrics["map"] <= 100
    assert ("kept_queries" in metrics) == (name in SELECTED)
    same = task.evaluate(dense, dense)
    assert same["agreement"] in (0, 100)  # 0: it is sure of nothing
    assert same.get("kept_queries", 100) == 100

    path = tmp_path / "masks.safetensors"
    save_masks(path, MaskCheckpoint(NMPattern("2:4"), result.masks, "", "maskllm", weights={}, prior={}))
    again = apply_masks_(task.build_model(0, pretrained=True), load_masks(path).masks, "2:4")
    torch.testing.assert_close(run(task, again, batch), run(task, learned, batch))
    deployed = task.exportable(fold_(again), 2)
    assert [tuple(x.shape) for x in deployed.inputs.values()] == [(2, 1, SIZE, SIZE)]
    assert deployed.module(*deployed.inputs.values()).keys() == set(deployed.outputs)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_weights_that_are_trained_get_gradients(name: str, folders: Path) -> None:
    """In training mode, all of them: processes wait for each other's gradients. Not what nothing is computed with."""
    task = opened(name, folders)
    model = task.build_model(0)
    task.train_mode(model)
    batch = some(task)
    task.loss(task.forward(model, batch), batch).backward()
    without = {key for key, tensor in model.named_parameters() if tensor.requires_grad and tensor.grad is None}
    beyond = {"DetrForObjectDetection": ".encoder.stages."}  # stages behind the one that DETR's tiny backbone gives
    assert not {key for key in without if beyond.get(name, "-") not in key}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_masks_are_learned_of_the_model_in_use(name: str, folders: Path) -> None:
    """Without dropout and further groups of queries; weights are trained with them."""
    task = opened(name, folders)
    model = task.build_model(0)
    learning_mode(task, model)
    assert not any(module.training for module in model.modules())
    task.train_mode(model)
    found = run(task, model, some(task))["logits"]
    assert found.shape[1] == QUERIES * (2 if name == "RfDetrForObjectDetection" else 1)


@pytest.mark.parametrize("name", SELECTED)
def test_tokens_are_those_that_queries_come_from(name: str, folders: Path) -> None:
    """In evaluation mode, each query begins at its token's place; what pruning moves is paired by that."""
    task = opened(name, folders)
    dense = task.build_model(0, pretrained=True)
    batch = some(task)
    tokens = run(task, dense, batch)["tokens"]
    assert tokens.shape == (4, 1, QUERIES)
    assert all(len(set(row.tolist())) == QUERIES for row in tokens[:, 0])

    pruned = copy.deepcopy(dense)
    score = "model.enc_out_class_embed.0" if name == "RfDetrForObjectDetection" else "model.enc_score_head"
    with torch.no_grad():  # other scores, other tokens
        pruned.get_submodule(score).weight.copy_(pruned.get_submodule(score).weight.flip(1))
    moved = run(task, pruned, batch)
    kept, all_of_them = task.family.kept(moved, {"tokens": tokens}).tolist()
    wanted = sum(
        len(set(a.tolist()) & set(b.tolist())) for a, b in zip(tokens[:, 0], moved["tokens"][:, 0], strict=True)
    )
    assert (kept, all_of_them) == (wanted, 4 * QUERIES)
    assert kept < all_of_them


def test_layers_of_queries_are_not_paired(folders: Path) -> None:
    parts = opened("RTDetrV2ForObjectDetection", folders).calibration(4, 0)
    assert [(part.layers, part.paired) for part in parts] == [
        (("model.backbone.*", "model.encoder.*", "*.value_proj"), True),
        (("*",), False),
    ]
    assert [part.paired for part in opened("YolosForObjectDetection", folders).calibration(4, 0)] == [True]


def test_padding_does_not_count(folders: Path) -> None:
    """DETR neither looks at it, nor do its tokens count; queries always do."""
    task = opened("DetrForObjectDetection", folders)
    model, batch = task.build_model(0, pretrained=True), some(task)
    half = batch._replace(valid=torch.tensor([[SIZE, SIZE // 2]] * 4))
    far = torch.arange(SIZE - 8, SIZE)  # from where convolutions reach nothing but padding
    grey = half._replace(images=batch.images.index_fill(3, far, 7.0))
    seen = [run(task, model, given)["boxes"] for given in (half, grey, batch, grey._replace(valid=batch.valid))]
    torch.testing.assert_close(seen[0], seen[1])
    assert not torch.allclose(seen[2], seen[3])

    side = SIZE // 8
    counting = task.family.tokens("model.encoder.layers.0.mlp.fc1", torch.Size([4, side**2]), half)
    assert counting.unflatten(1, (side, side))[..., : side // 2].all()
    assert not counting.unflatten(1, (side, side))[..., side // 2 :].any()
    assert task.family.tokens("model.decoder.layers.0.mlp.fc1", torch.Size([4, QUERIES]), half) is None
    assert task.family.tokens("model.encoder.layers.0.mlp.fc1", torch.Size([4, side**2]), batch) is None
    with pytest.raises(ConfigError, match=r"sees 5 tokens"):
        task.family.tokens("model.encoder.layers.0.mlp.fc1", torch.Size([4, 5]), half)

    yolos = opened("YolosForObjectDetection", folders).family
    counting = yolos.tokens("vit.encoder.layer.0.output.dense", torch.Size([4, 1 + side**2 + QUERIES]), half)
    assert counting.sum(1).tolist() == [1 + side**2 // 2 + QUERIES] * 4


def test_micro_batches_change_nothing(folders: Path) -> None:
    """Losses are sums: those of parts add up to that of the whole, however objects are spread."""
    for name in ("YolosForObjectDetection", "RTDetrV2ForObjectDetection"):
        task = opened(name, folders)
        model, batch = task.build_model(0, pretrained=True), some(task)
        batch = batch._replace(classes=batch.classes.index_fill(0, torch.tensor([1]), NONE))  # one without objects
        parts = [type(batch)(*(tensor[half] for tensor in batch)) for half in (slice(2), slice(2, 4))]
        whole, *split = (run(task, model, part) for part in (batch, *parts))
        loss = sum(float(task.loss(found, part)) for found, part in zip(split, parts, strict=True))
        assert loss == pytest.approx(float(task.loss(whole, batch)), rel=1e-5)
        assert (
            sum(int(task.weight(part)) for part in parts) == int(task.weight(batch)) == int((batch.classes >= 0).sum())
        )


def test_classes_are_found_by_name(folders: Path, tmp_path: Path) -> None:
    """As COCO's 80 are among the 91 labels of YOLOS and DETR; labels that the data lack are never detected."""
    names = ["N/A", *(str(digit) for digit in reversed(range(10)))]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    folder = tiny_detectors.save("YolosForObjectDetection", tmp_path / "named", num_labels=11, **labels)
    task = tiny_detectors.task("YolosForObjectDetection", folder, folders / "data", classes=11)
    batch = some(task)
    assert task.manifest.classes == tuple(map(str, range(10)))
    logits = torch.full((4, QUERIES, 12), -5.0)
    logits[..., 0] = 9  # N/A
    logits[..., names.index("7")] = 5
    outputs = {"logits": logits, "boxes": torch.rand(4, QUERIES, 4)}
    assert (task.family.detections(outputs, batch).classes == 7).all()

    sevens = batch._replace(classes=torch.where(batch.classes == NONE, NONE, 7))
    eights = batch._replace(classes=torch.where(batch.classes == NONE, NONE, 8))
    assert float(task.loss(outputs, sevens)) < float(task.loss(outputs, eights))


def test_bad_settings_and_folders(folders: Path, tmp_path: Path) -> None:
    name = "YolosForObjectDetection"
    task = opened(name, folders, classes=9)
    with pytest.raises(ConfigError, match=r"model.classes is 9, but .*config.json has 10 classes"):
        task.build_model(0)
    with pytest.raises(ConfigError, match=r"model.classes is 9, but s has objects of 10 classes"):
        some(task)
    labels = {"id2label": {i: f"kind {i}" for i in range(10)}, "label2id": {f"kind {i}": i for i in range(10)}}
    folder = tiny_detectors.save(name, tmp_path / "named", **labels)
    with pytest.raises(ConfigError, match=r"id2label has no '0', '1', '2' and 7 more, but s has; allowed: 'kind 0'"):
        some(tiny_detectors.task(name, folder, folders / "data"))
    for settings, said in (
        ({"name": name, "classes": 3}, "folder is needed"),
        ({"name": "Eva", "classes": 3, "stride": 4, "folder": "x"}, "folder is needed"),
        ({"name": name, "classes": 3, "folder": "x", "stride": 4}, "stride is needed"),
        ({"name": "Eva", "classes": 3}, "stride is needed"),
        ({"name": name, "classes": 3, "folder": "x", "args": {"depth": 3}}, "args is not for"),
        ({"name": "BertModel", "classes": 3, "folder": "x"}, "allowed for task 'detection'"),
    ):
        with pytest.raises(ValueError, match=said):
            DetectorSettings.model_validate(settings)
    made = DetectorSettings(name=name, folder="x", classes=3)
    assert "exclude" not in made.beyond_defaults()
    assert DetectorSettings.model_validate(made.beyond_defaults()) == made
