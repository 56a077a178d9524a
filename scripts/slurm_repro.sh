#!/usr/bin/env bash
# The active experiment under Slurm: `dvc repro` on the first node, a process for every GPU on all of them.
#
#   sbatch --nodes 2 --gpus-per-node 8 --cpus-per-task 96 --time 24:00:00 scripts/slurm_repro.sh
#
# Two minutes before its time is over, and on scancel, the training saves its state; the next job goes on from it:
#
#   for i in 1 2 3; do sbatch --dependency singleton ...as above...; done
#
#SBATCH --job-name maskllm4v
#SBATCH --ntasks-per-node 1
#SBATCH --signal TERM@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch}"
source .venv/bin/activate
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# What stages start themselves with (see docs/scale.md); PROCESSES: a node, by default one a GPU.
export MASKLLM4V_LAUNCHER="srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} torchrun --nnodes $SLURM_NNODES \
--nproc-per-node ${PROCESSES:-gpu} --rdzv-id $SLURM_JOB_ID --rdzv-backend c10d --rdzv-endpoint $first:${PORT:-29500}"
dvc repro "$@"
