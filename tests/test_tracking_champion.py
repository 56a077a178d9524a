"""The best row's model in the registry, loaded by MLflow alone in processes that know nothing of us."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow_server import runs, server, their_warnings
from small_pipeline import ENVIRONMENT
from small_project import copied, ready_project, run_stage, said, tiny_params

from maskllm4v.config import Experiment, load_experiment
from maskllm4v.export.writing import folded_row
from maskllm4v.runs.paths import record_file
from maskllm4v.runs.records import write_record
from maskllm4v.tasks.base import ExportableModel, open_task
from maskllm4v.tracking.champion import _save
from maskllm4v.tracking.publishing import publish
from maskllm4v.utils.io import read_json

pytestmark = pytest.mark.slow

ROWS = ("tiny-dense", "tiny-magnitude", "tiny-wanda")
NAME = "maskllm4v-tiny"
LOAD = """
import sys
import mlflow, numpy, torch

inputs, model, *names = {**numpy.load(sys.argv[1])}, sys.argv[2], *sys.argv[3:]
exported = mlflow.pytorch.load_model(model)
tensors = [torch.from_numpy(inputs[name]) for name in names]
called = mlflow.pyfunc.load_model(model)
named = called.metadata.signature.inputs.has_input_names()
with torch.no_grad():
    outputs = exported(*tensors)
if isinstance(outputs, torch.Tensor):
    numpy.save("exported.npy", outputs.numpy())
    numpy.save("called.npy", called.predict(inputs if named else inputs[names[0]]))
else:
    numpy.savez("exported.npz", **{name: tensor.numpy() for name, tensor in outputs.items()})
    numpy.savez("called.npz", **called.predict(inputs))
assert "maskllm4v" not in sys.modules
assert called.metadata.signature is not None and called.input_example is not None
"""


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with their_warnings():
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with two one-shot rows, both measured, the first of them the better one."""
    params = tiny_params() | {"learned": {}, "updated": {}, "finetuned": {}, "rows": {row: row for row in ROWS}}
    params["priors"] = {row: params["priors"][row] for row in ROWS[1:]}
    folder = ready_project(tmp_path_factory.mktemp("measured"), params)
    assert run_stage(folder, "prior", "tiny-wanda") == [0], said(folder)
    for row in ROWS:
        assert run_stage(folder, "evaluate", row) == [0], said(folder)
    win(folder, "tiny-magnitude")
    return folder


def win(folder: Path, row: str) -> None:
    """Make a row the best one."""
    for other in ROWS:
        path = record_file("tiny", other, folder / "reports")
        record = read_json(path)
        record["metrics"]["0"]["top1"] = 90.0 if other == row else 50.0
        write_record(path, record)


def settings(folder: Path) -> Experiment:
    return load_experiment(folder / "params.yaml")


def folded(folder: Path, row: str, batch: int) -> ExportableModel:
    with chdir(folder):
        task = open_task(settings(folder).task_spec(), Path("artifacts/data/digits"))
        return task.exportable(folded_row(settings(folder), task, row).model.eval(), batch)


def loads(model: str, wanted: ExportableModel, folder: Path, **environment: str) -> None:
    """Both ways of MLflow give what the folded model gives, in a process of its own, away from the repository."""
    folder.mkdir()
    np.savez(folder / "inputs.npz", **{name: tensor.numpy() for name, tensor in wanted.inputs.items()})
    with torch.no_grad():
        expected = wanted.named(wanted.module(*wanted.inputs.values()))
    command = [sys.executable, "-I", "-c", LOAD, "inputs.npz", model, *wanted.inputs]
    done = subprocess.run(
        command, cwd=folder, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for found in ("exported", "called"):
        if len(wanted.outputs) == 1:
            assert np.array_equal(np.load(folder / f"{found}.npy"), expected[wanted.outputs[0]].numpy())
            continue
        arrays = np.load(folder / f"{found}.npz")
        assert set(arrays.files) == set(wanted.outputs)
        for name, tensor in expected.items():
            assert np.array_equal(arrays[name], tensor.numpy())


def test_the_champion(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Registered once for each best row; loaded for any batch size; without its files a line says so."""
    from mlflow.tracking import MlflowClient

    project = copied(measured, tmp_path / "project")
    store = f"sqlite:///{project}/mlflow.db"
    client = MlflowClient(store)

    def versions() -> dict[str, str]:
        publish(project, settings(project))
        found = client.search_model_versions(f"name = '{NAME}'")
        return {str(version.version): version.tags["row"] for version in found}

    assert versions() == versions() == {"1": "tiny-magnitude"}
    champion = client.get_model_version_by_alias(NAME, "champion")
    (run,) = [run for run in runs(store, "tiny") if run.data.tags["row"] == "tiny-magnitude"]
    assert champion.run_id == run.info.run_id
    (model,) = run.outputs.model_outputs
    place = Path(client.get_logged_model(model.model_id).artifact_location.removeprefix("file://"))
    assert place.is_relative_to(project / "mlruns")
    assert not [path for path in place.rglob("*") if path.suffix in (".pkl", ".pth", ".pickle")]
    for batch in (1, 5):
        wanted = folded(project, "tiny-magnitude", batch)
        loads(f"models:/{NAME}@champion", wanted, tmp_path / str(batch), MLFLOW_TRACKING_URI=store)

    win(project, "tiny-wanda")
    assert versions() == {"1": "tiny-magnitude", "2": "tiny-wanda"}
    assert str(client.get_model_version_by_alias(NAME, "champion").version) == "2"

    win(project, "tiny-magnitude")
    assert versions() == {"1": "tiny-magnitude", "2": "tiny-wanda"}
    assert str(client.get_model_version_by_alias(NAME, "champion").version) == "1"

    # Another record of the best row, whose masks are not those that lie here.
    record = record_file("tiny", "tiny-magnitude", project / "reports")
    write_record(record, {**read_json(record), "inputs": {**read_json(record)["inputs"], "masks": ["others"]}})
    capsys.readouterr()
    assert len(versions()) == 2
    assert "is another one than that which was measured" in capsys.readouterr().out
    (project / "artifacts/tiny-magnitude/seed0.safetensors").unlink()
    assert len(versions()) == 2
    said = capsys.readouterr().out.splitlines()
    assert [line.startswith(f"{NAME}: no new champion; tiny-magnitude is the best row") for line in said] == [True]
    assert str(client.get_model_version_by_alias(NAME, "champion").version) == "1"


def test_the_champion_over_http(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = copied(measured, tmp_path / "project")
    with server(tmp_path) as found:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", found.uri)
        publish(project, settings(project))
        wanted = folded(project, "tiny-magnitude", 3)
        loads(f"models:/{NAME}@champion", wanted, tmp_path / "fresh", MLFLOW_TRACKING_URI=found.uri)


def test_a_model_of_several_inputs(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from small_diffusion import awake, open_small

    task = open_small(tmp_path / "nothing here")
    model = awake(task.build_model(0)).eval()
    _save(tmp_path / "model", task.exportable(model, 2), "", "m-0")
    loads(str(tmp_path / "model"), task.exportable(model, 3), tmp_path / "fresh")


class Boxes(torch.nn.Module):
    """One input, two outputs by name; a tensor decides which operations run, as in EoMT."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 6)
        self.attn_mask_probs = torch.nn.Buffer(torch.tensor([0.0]))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.layer(x)
        if self.attn_mask_probs[0] > 0:
            hidden = hidden.relu()
        return {"boxes": hidden.sigmoid(), "logits": hidden.sum(-1)}


def test_a_model_of_several_outputs(tmp_path: Path) -> None:
    model = Boxes().eval()
    _save(tmp_path / "model", ExportableModel(model, {"x": torch.randn(2, 4)}, ("logits", "boxes")), "", "m-0")
    assert isinstance(model.attn_mask_probs, torch.Tensor)
    wanted = ExportableModel(model, {"x": torch.randn(3, 4)}, ("logits", "boxes"))
    loads(str(tmp_path / "model"), wanted, tmp_path / "fresh")
