"""Obtain the dense model of every seed: ``artifacts/<row>/seed<k>.safetensors``; and the judge of samples, if any."""

from __future__ import annotations

from maskllm4v.config import DenseRow, Experiment
from maskllm4v.runs.paths import checkpoint, data_folder, judge_file
from stages.entry import run


def main(experiment: Experiment, row: str) -> None:
    from maskllm4v.checkpoints.masks import save_dense
    from maskllm4v.runs.makers import note_maker
    from maskllm4v.runs.provenance import write_origin
    from maskllm4v.runs.seeds import map_seeds
    from maskllm4v.tasks.base import open_task
    from maskllm4v.training.dense import obtain_dense, train_judge
    from maskllm4v.training.resume import only_training, resume_of
    from maskllm4v.utils.processes import is_main

    made = experiment.row_of(DenseRow, row)
    task = open_task(experiment.task_spec(), data_folder(experiment.data.name))

    def one(seed: int, position: int) -> None:
        resume = resume_of(experiment, row, seed, manifest=task.data_digest)
        model = obtain_dense(experiment.dense, task, seed, position, resume)
        if is_main():
            note_maker(row, seed, save_dense(checkpoint(row, seed), model, experiment.model.name))

    with only_training(row):
        map_seeds(experiment, made.seeds, one)
        if judge := task.judge:
            classifier = train_judge(judge, experiment.seeds[0])
            if is_main():
                save_dense(judge_file(row), classifier, judge.model)
        write_origin(experiment, row)


if __name__ == "__main__":
    run("dense", main)
