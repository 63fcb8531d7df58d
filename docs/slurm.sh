#!/bin/bash
# Training on several machines under SLURM: one torchrun a node, which starts one process a GPU. From the repository:
#
#     sbatch docs/slurm.sh config/full_llama_1.36b.py --parallelism=fsdp --out_dir=/shared/out/llama
#     sbatch --nodes=4 --time=12:00:00 docs/slurm.sh config/full_llama_1.36b.py --out_dir=/shared/out/llama
#
# out_dir, the dataset and this folder lie on a file system that all nodes share. Shortly before the time limit the run saves
# and stops; the job is then put back into the queue and goes on where it was, until the run is finished.

#SBATCH --job-name=kitbash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1            # one torchrun
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300              # to the torchruns, so many seconds before the end: longer than a save takes
#SBATCH --requeue                      # after a node has failed, or for a job of higher priority
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
processes=${PROCESSES_PER_NODE:-gpu}                       # 'gpu': one for each
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240                  # seconds that torchrun waits for the save; 30 if nothing is said
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
printed=$(mktemp)

srun --kill-on-bad-exit=0 torchrun \
    --nnodes="$SLURM_NNODES" --nproc_per_node="$processes" --max-restarts=3 \
    --rdzv_backend=c10d --rdzv_endpoint="$first_node:$((29500 + SLURM_JOB_ID % 1000))" \
    --rdzv_id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    train.py "$@" --resume=auto 2>&1 | tee "$printed"
code=$?

if grep -q "^stopped after step" "$printed"; then          # by the signal: torchrun returns 1, but all is well
    scontrol requeue "$SLURM_JOB_ID" && code=0
fi
rm -f "$printed"
exit "$code"
