#!/bin/bash
# A sweep on all GPUs of a Slurm job: sbatch examples/launch/sweep_slurm.sh
# It starts Ray on every node of the job, the sweep on the first, and ends Ray with it. Submit it again to resume.
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive

# The two lines to change. OUTPUT, and the model and data of CONFIG, must be on storage that all nodes see.
CONFIG=quickstart_sweep
OUTPUT=$HOME/runs/sweep

set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(getent ahostsv4 "$head" | awk '{print $1; exit}'):6379
# Ray's usage reports are off. Ray waits so many seconds for the nodes.
export RAY_USAGE_STATS_ENABLED=0 RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
srun --kill-on-bad-exit=1 ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-gpus "$SLURM_GPUS_ON_NODE" -- \
  loraplus sweep "$CONFIG" --output_dir "$OUTPUT" --sweep.ray "$address"
