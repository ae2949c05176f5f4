#!/bin/bash
# Trains on a SLURM cluster, with one task per node that uses all GPUs of the node:
#
#     sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh --config=configs/pascal.py:split=183 \
#         --config.data.root=/data/voc --config.data.labeled_batch=16 --config.data.unlabeled_batch=16 --workdir=/runs/voc183
#
# Arguments after the script's name go to main.py. The processes connect through SLURM. /data and the work directory
# must be the same on all nodes (a shared file system or a bucket). SLURM sends SIGTERM 120 s before the time limit and
# on preemption; the run then saves its state and exits, and the job is requeued to continue.
#SBATCH --job-name=dssn
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
cd "${SLURM_SUBMIT_DIR:?sbatch this script from the root of the repository}" || exit 1
srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" main.py "$@"
status=$?
# 143 = 128 + 15: SIGTERM. main.py has saved its state, and the same command continues.
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
