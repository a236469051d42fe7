#!/bin/bash
# One training run on all GPUs of a Slurm job, a process for each GPU: sbatch examples/launch/train_slurm.sh
# Submit it again to resume.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# The run saves and stops 5 minutes before the end.
#SBATCH --signal=TERM@300

# The two lines to change. OUTPUT must be on storage that all nodes see.
CONFIG=config.yaml
OUTPUT=$HOME/runs/train

# GPUs per node, not per task: JAX asks for the GPU with the task's number on its node.
srun loraplus train "$CONFIG" --output_dir "$OUTPUT" --distributed.coordinator auto
