"""Mistakes on the command line, told in a line; and the command lines of the original, taken as they are."""

from __future__ import annotations

import argparse
import ast
import re
import shutil
from pathlib import Path

import pytest
from commands import DENSE, MODEL, TRAIN, made_of, make_project, run, well
from import_graph import ROOT

from maskllm4v.checkpoints.masks import load_masks
from maskllm4v.cli import options, prune, train, validate
from maskllm4v.cli.main import COMMANDS
from maskllm4v.cli.wording import in_options
from maskllm4v.config import LearningSettings, load_experiment


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("project"))
    shutil.copytree(folder / "data" / "imagenet", folder / "two", ignore=shutil.ignore_patterns("owl"))
    (folder / "cut.pt").write_bytes((folder / "dense.pt").read_bytes()[:-1000])
    return folder


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of links to the same inputs."""
    for name in ("data", "dense.pt", "two", "cut.pt"):
        (tmp_path / name).symlink_to(project / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


PRUNE = ("prune", *MODEL, "--save-model", "out/m.safetensors")
LEARN = ("train", *TRAIN, *DENSE, "--output", "out/m.safetensors")
MEASURE = ("validate", *MODEL)
HEAD = "see maskllm4v"


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ((*PRUNE, "--log-wandb"), 2, f"prune: unrecognized arguments: --log-wandb; {HEAD} prune --help"),
        ((*PRUNE, "--pruner", "wunda"), 2, "prune: argument --pruner: invalid choice: 'wunda' (choose from "),
        ((*PRUNE, "--N", "2", "--M", "4"), 2, f"prune: no --N here: say --pattern N:M; {HEAD} prune --help"),
        ((*PRUNE, "--save-model", "out/m.pt"), 2, "'out/m.pt': masks are written as safetensors; end the name in"),
        ((*PRUNE, *DENSE, "--enable-update"), 1, "prune: --enable-update is true, but 'magnitude' cannot update"),
        ((*PRUNE, *DENSE, "--pattern", "4:2"), 1, "prune: pattern 4:2: N counts kept weights"),
        ((*PRUNE, *DENSE, "--exclude", "tail"), 1, "prune: exclude: 'tail' matches no layer"),
        ((*PRUNE, *DENSE, "--pruner", "wanda"), 1, "prune: --nsamples is 128, but the train split has 9 images"),
        ((*PRUNE, *DENSE, "--nsamples", "0"), 1, "prune: --nsamples is 0; input should be greater than or equal to 1"),
        ((*PRUNE, "--dense-checkpoint", "absent.pt"), 1, "prune: absent.pt is missing"),
        ((*PRUNE, *DENSE, "--num-classes", "4"), 1, "prune: dense.pt does not fit the model: size mismatch"),
        ((*PRUNE, *DENSE, "--model", "test_vid"), 1, "prune: --model is 'test_vid', which timm does not know"),
        (("train", *MODEL, "--output", "out"), 2, "'out': masks are written as safetensors; end the name in"),
        ((*LEARN, "--epochs", "1"), 2, "train: argument --epochs: not allowed with argument --steps"),
        ((*LEARN, "--sparsity-mode", "sparse"), 2, "argument --sparsity-mode: invalid choice: 'sparse'"),
        ((*LEARN, "--log-wandb"), 2, "train: no --log-wandb here: the curve is a CSV file (--curve)"),
        ((*LEARN, "--resume", "x.pth.tar"), 2, "train: no --resume here: the same command again goes on"),
        ((*LEARN, "--warmup-epochs", "1"), 1, "train: --warmup-epochs goes with --epochs; with --steps say --warmup"),
        ((*LEARN, "--tau-range", "-1", "1"), 1, "train: --tau-range is -1.0; input should be greater than 0"),
        (
            (*LEARN, "--grad-accum-steps", "3"),
            1,
            "train: --grad-accum-steps is 3, which does not divide --batch-size 4",
        ),
        ((*LEARN, "--opt", "adamz"), 1, "train: --opt is 'adamz'; allowed: "),
        ((*LEARN, "--amp", "--device", "cpu"), 1, "train: --amp is 'fp16', which CPUs do not train in"),
        ((*LEARN, "--data-dir", "nowhere"), 1, "train: nowhere/train is no folder; expected nowhere/train/<class>/"),
        ((*LEARN, "--checkpoint", "dense.pt"), 1, "dense.pt holds no masks to start from; dense weights are --dense"),
        ((*MEASURE, "--sparsity-mode", "sparse"), 1, "validate: --sparsity-mode sparse needs --checkpoint"),
        ((*MEASURE, "--sparsity-mode", "sparse", "--checkpoint", "dense.pt"), 1, "validate: dense.pt holds no masks"),
        (
            (*MEASURE, "--checkpoint", "dense.pt", "--data-dir", "two"),
            1,
            "two has 2 classes, but test_vit tells 3 apart",
        ),
        ((*MEASURE, "--checkpoint", "cut.pt"), 1, "validate: cut.pt is damaged"),
        ((*MEASURE, "--checkpoint", "dense.pt", "--use-ema"), 1, "validate: dense.pt holds no averaged weights (EMA)"),
        ((*MEASURE, "--checkpoint", "dense.pt", "--device", "abacus"), 1, "--device is 'abacus'; allowed: "),
        ((), 2, f"maskllm4v: the following arguments are required: command; {HEAD} --help"),
    ],
    ids=lambda value: "-".join(value[-2:]).strip("-") if isinstance(value, tuple) else "",
)
def test_mistakes_are_told_in_a_line(flags: tuple[str, ...], code: int, message: str, here: Path) -> None:
    done = run(*flags)
    assert (done.code, done.out) == (code, "")
    *notes, said = done.err.splitlines()
    assert message in said
    assert all(note in ("dense weights: dense.pt", "weights: dense.pt") for note in notes)
    assert made_of(here) == {"two", "cut.pt"}  # nothing half-written


NAME = "vit_base_patch16_224.augreg_in1k"
AS_PRINTED = [  # the original's README, names of files to write apart
    f"prune --model {NAME}  --pruner sparsegpt --save-model output/pruned/{NAME}.sparsegpt24.safetensors",
    f"prune --model {NAME} --pruner magnitude --save-model output/pruned/{NAME}.magnitude24.safetensors",
    f"prune --model {NAME}  --pruner wanda --save-model output/pruned/{NAME}.wanda24.safetensors",
    f"prune --model {NAME} --pruner sparsegpt --save-model output/pruned/{NAME}.u.safetensors --enable-update",
    f"prune --data-path data/imagenet --ckpt d.pt --image-size 224 --nsamples 9 -m {NAME} --save-model a.safetensors",
    f"validate --model {NAME}  --pretrained",
    f"validate --model vit_base_patch16_224 --checkpoint output/pruned/{NAME}.wanda24.pt --sparsity-mode sparse",
    "validate --model vit_base_patch16_224 --checkpoint output/m/model_best.pth.tar --sparsity-mode maskllm",
    f"validate -m {NAME} --pretrained --split val --use-ema -b 64 -j 8 --amp --device cuda",
]


@pytest.mark.parametrize("line", AS_PRINTED)
def test_command_lines_of_the_original(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []
    for command in (prune, validate):
        monkeypatch.setattr(command, "run", seen.append)
    well(*line.split())
    assert seen[0].model.startswith("vit_base_patch16_224")


SCRIPT = """--model vit_base_patch16_224 --sparsity-mode maskllm --mask-only
    --sparse-checkpoint output/pruned/vit_base_patch16_224.augreg_in1k.sparsegpt24.pt -b 512 --opt adamw --lr 1e-3
    --weight-decay 0.01 --epochs {epochs} --warmup-epochs 0 --mixup 0.8 --cutmix 1.0 --sched cosine --smoothing 0.1
    --drop-path 0.1 --aa rand-m8-inc1-mstd101 --remode pixel --reprob 0.3 --amp --amp-dtype bfloat16 --crop-pct 0.9
    --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --output output/maskllm.safetensors --sparse-weight-reg 1e-5 --clip-grad 2.0
    --min-lr 1e-4 --anneal epoch --log-interval 50 """


@pytest.mark.parametrize(
    ("row", "flags"),
    [
        ("20ep", "--scaling-range 1e1 1e2 --tau-range 4 0.05 --model-ema --model-ema-decay 0.9998"),
        ("1ep", "--scaling-range 1e2 1e2 --tau-range 1 1 --prior-strength 3"),
    ],
)
def test_training_scripts_of_the_original(row: str, flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags that its scripts give, with the global batch, are the settings of the ImageNet experiment."""
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(train, "run", seen.append)
    well("train", *f"{SCRIPT} {flags}".format(epochs=row[:-2]).split())
    found, expected = train.settings(seen[0]), load_experiment(ROOT / "experiments" / "imagenet_vit_b16.yaml")
    ours = expected.learned[f"imagenet-maskllm-{row}-sparsegpt"]
    assert dict(found.learning) == {key: getattr(ours, key) for key in LearningSettings.model_fields}
    assert found.task == expected.task
    assert found.model == expected.model.model_copy(update={"name": "vit_base_patch16_224"})
    assert found.data is not None
    assert found.data.root == expected.data.root


def test_warm_up_in_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(train, "run", seen.append)
    well("train", *MODEL, "--output", "a.safetensors", "--epochs", "20", "--warmup-epochs", "5")
    assert train.settings(seen[0]).learning.warmup == 0.25


# Advice


def parsers() -> dict[str, options.Parser]:
    """The parser of each command."""
    found: dict[str, options.Parser] = {}
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        found[name] = options.Parser(prog=f"maskllm4v {name}")
        command.add_arguments(found[name])
    return found


SHARED = ("prune", "train", "update", "validate", "export")  # commands that use cli/inputs.py


@pytest.mark.parametrize("file", sorted((ROOT / "maskllm4v" / "cli").glob("*.py")), ids=lambda path: path.stem)
def test_messages_name_options_that_commands_have(file: Path) -> None:
    of, found = parsers(), set[str]()
    commands = SHARED if file.stem == "inputs" else [name for name in of if name == file.stem]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Raise):
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            found.update(*(re.findall(r"--[a-z]+(?:-[a-z]+)*", text) for text in texts if isinstance(text, str)))
    assert not [(name, flag) for name in commands for flag in found if not of[name].has(flag)]
    assert commands or not found
    assert found or file.stem not in ("inputs", "train", "export", "validate", "sample")


SAID = {
    "layer 'a': no multiple of 4; leave it dense with `exclude`, or all such layers with `on_misfit='skip'`": {
        "prune": "layer 'a': no multiple of 4; leave it dense with --exclude",
        "shrink": "layer 'a': no multiple of 4",
    },
    "at most 70; give each position one with `gate='positions'`": {
        "train": "at most 70; give each position one with --gate positions",
        "prune": "at most 70",
    },
    "singular; calibrate on more samples, or raise `damping`": {
        "update": "singular; calibrate on more samples, or raise --damping",
        "prune": "singular; calibrate on more samples",
    },
    "data.calibration is 9, but the split has 3": {
        "prune": "--nsamples is 9, but the split has 3",
        "train": "data.calibration is 9, but the split has 3",
    },
    "batch_size is 3, which 2 processes do not divide": {
        "train": "--batch-size is 3, which 2 processes do not divide",
        "shrink": "batch_size is 3, which 2 processes do not divide",
    },
    "out/batch_size.pt is missing; run `dvc repro`": {"prune": "out/batch_size.pt is missing; run `dvc repro`"},
    "amplitude is 3": {"train": "amplitude is 3"},
    "two lines; a\nb; c, or `exclude`": {"prune": "two lines; a\nb; c, or --exclude"},
}


@pytest.mark.parametrize("text", SAID)
def test_advice_of_the_library_names_options_of_the_command(text: str) -> None:
    of = parsers()
    for command, expected in SAID[text].items():
        assert in_options(text, of[command].has) == expected


def test_advice_is_given_in_options(here: Path) -> None:
    done = run(*PRUNE, *DENSE, "--pattern", "2:5")
    assert done.err.splitlines()[-1].endswith("as 2:5 needs; leave it dense with --exclude")
    done = run("train", *TRAIN, *DENSE, "--output", "m.safetensors", "--pattern", "8:16")
    assert done.err.splitlines()[-1].endswith("are supported; give each position one with --gate positions")


def test_masks_learned_with_a_logit_a_position(here: Path) -> None:
    well("train", *TRAIN, *DENSE, "--output", "m.safetensors", "--pattern", "8:16", "--gate", "positions")
    found = load_masks(Path("m.safetensors"))
    assert (str(found.pattern), found.gate) == ("8:16", "positions")
