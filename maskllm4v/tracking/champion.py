"""The best row's folded model in MLflow's registry: ``models:/maskllm4v-<table>@champion``.

It is written as an exported graph (``torch.export``): no pickle, and no code of ours is needed to load it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from contextlib import chdir, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pandas as pd

from maskllm4v.config import Experiment
from maskllm4v.reporting.aggregate import best_row
from maskllm4v.runs.paths import checkpoint, data_folder
from maskllm4v.runs.workspace import SERVER
from maskllm4v.tracking.store import insisting, upload_limit
from maskllm4v.utils.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

    from maskllm4v.tasks.base import ExportableModel

ALIAS = "champion"
BATCH = 2  # of the example that graphs are traced with; they take any


def publish_champion(
    client: MlflowClient,
    root: Path,
    experiment: Experiment,
    table: pd.DataFrame,
    records: Mapping[str, Mapping[str, Any]],
    digests: Mapping[str, str],
    runs: Mapping[str, str | None],
) -> None:
    """Have a version of the best row's model, and the alias on it; say so where the model is not on this machine.

    Args:
        client: of the store.
        root: the repository's root.
        experiment: of the table.
        table: its lines, see :func:`~maskllm4v.reporting.aggregate.aggregate`.
        records, digests, runs: record, digest of its files, and id of its run, by row.
    """
    from mlflow.exceptions import MlflowException

    row, name = best_row(experiment, table), f"maskllm4v-{experiment.table}"
    if row is None or (run_id := runs[row]) is None:
        return
    if not _versions(client, name, digests[row]):
        try:
            with chdir(root):
                exportable = _measured_model(experiment, row, records[row])
        except UserError as error:
            print(f"{name}: no new {ALIAS}; {row} is the best row, but its model is not here ({error})")
            return
        _register(client, name, run_id, exportable, {"row": row, "record_digest": digests[row]})
    version, *others = _versions(client, name, digests[row])
    for other in others:  # another writer came at the same time, keeps the same one, and deletes the others, too
        with suppress(MlflowException):
            client.delete_model_version(name, other.version)
    if ALIAS not in version.aliases:
        insisting(lambda: client.set_registered_model_alias(name, ALIAS, version.version))


def _versions(client: MlflowClient, name: str, digest: str) -> list[ModelVersion]:
    """The versions of a record's model, the first one first; with the aliases of each."""
    found = client.search_model_versions(f"name = '{name}'", max_results=1000)
    mine = [version for version in found if version.tags.get("record_digest") == digest]
    return [client.get_model_version(name, v.version) for v in sorted(mine, key=lambda v: int(v.version))]


def _measured_model(experiment: Experiment, row: str, record: Mapping[str, Any]) -> ExportableModel:
    """The folded model of a row's first seed.

    Raises:
        UserError: its files are not those that the record was measured on, or not here.
    """
    from maskllm4v.checkpoints.masks import load_masks
    from maskllm4v.export.writing import folded_row
    from maskllm4v.runs.provenance import read_origin
    from maskllm4v.tasks.base import open_task

    read_origin(experiment, row)
    task = open_task(experiment.task_spec(), data_folder(experiment.data.name))
    path = checkpoint(row, record["seeds"][0])
    folded = folded_row(experiment, task, row)
    found = {"manifest": folded.manifest, "dense": folded.base, "masks": load_masks(path).digest}
    inputs = record["inputs"]
    if found != {"manifest": inputs["manifest"], "dense": inputs["dense"][0], "masks": inputs["masks"][0]}:
        raise CheckpointError(f"{path} is another one than that which was measured")
    folded.model.eval()
    return task.exportable(folded.model, BATCH)


def _register(
    client: MlflowClient, name: str, run_id: str, exportable: ExportableModel, tags: Mapping[str, str]
) -> None:
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.exceptions import MlflowException

    experiment_id = client.get_run(run_id).info.experiment_id
    model = client.create_logged_model(experiment_id, name="model", source_run_id=run_id, tags=dict(tags))
    with TemporaryDirectory() as folder:
        _save(Path(folder) / "model", exportable, run_id, model.model_id)
        with upload_limit():
            client.log_model_artifacts(model.model_id, f"{folder}/model")
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    with suppress(MlflowException):  # it exists
        client.create_registered_model(name)
    # A server takes the model's name alone; a client of a file would look the name up in its default store.
    source = f"models:/{model.model_id}" if os.environ.get(SERVER) else model.artifact_location
    client.create_model_version(name, source, run_id, dict(tags), model_id=model.model_id)


def _save(path: Path, exportable: ExportableModel, run_id: str, model_id: str) -> None:
    """An MLflow model for ``mlflow.pytorch`` and ``mlflow.pyfunc``, for any batch size, with signature and example."""
    import mlflow.pytorch
    import torch
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.models.utils import _save_example
    from mlflow.types import Schema, TensorSpec
    from torch import Tensor

    from maskllm4v.export.tracing import make_constant_, traceable
    from maskllm4v.tracking import named_tensors

    def spec(tensor: Tensor, name: str | None = None) -> TensorSpec:
        return TensorSpec(tensor.numpy().dtype, (-1, *tensor.shape[1:]), name)

    module, examples, outputs = copy.deepcopy(exportable.module), exportable.inputs, exportable.outputs
    make_constant_(module)
    several = len(examples) > 1 or len(outputs) > 1
    with torch.no_grad():
        given = exportable.named(module(*examples.values()))
    inputs = [spec(tensor, name if several else None) for name, tensor in examples.items()]
    named = [spec(tensor, name if len(outputs) > 1 else None) for name, tensor in given.items()]
    arrays = [tensor.numpy() for tensor in examples.values()]
    model = Model(run_id=run_id, model_id=model_id)
    with traceable(module):
        mlflow.pytorch.save_model(
            module,
            path,
            mlflow_model=model,
            signature=ModelSignature(Schema(inputs), Schema(named)),
            input_example=tuple(arrays) if len(arrays) > 1 else arrays[0],
            serialization_format="pt2",
            pip_requirements=[f"{name}=={_release(name)}" for name in ("mlflow", "torch")],
            code_paths=[named_tensors.__file__] if several else None,
        )
    if several:
        _save_example(model, {name: tensor.numpy() for name, tensor in examples.items()}, str(path))
        loader = named_tensors.__name__.rpartition(".")[2]
        pyfunc.add_to_model(model, loader_module=loader, data="data", code="code", python_env="python_env.yaml")
        model.save(path / "MLmodel")


def _release(name: str) -> str:
    from importlib.metadata import version

    return version(name).partition("+")[0]
