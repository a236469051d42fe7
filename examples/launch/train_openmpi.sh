#!/bin/bash
# One training run with Open MPI, a process for each GPU: bash examples/launch/train_openmpi.sh
# Run it again to resume.

# The two lines to change: hosts with their numbers of GPUs, and the run. Its output_dir must be on storage that all
# hosts see.
HOSTS=node1:8,node2:8
RUN="loraplus train config.yaml --output_dir runs/train"

# JAX needs the address of the first process, which it takes from Open MPI's environment.
mpirun --host "$HOSTS" --map-by slot --bind-to none -x PATH -x PYTHONPATH $RUN --distributed.coordinator auto
