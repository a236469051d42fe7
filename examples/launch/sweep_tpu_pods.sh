#!/bin/bash
# A sweep on several TPU VMs, or on all hosts of a pod slice: bash examples/launch/sweep_tpu_pods.sh
# Run it where gcloud is, once the TPU VMs exist and have loraplus_jax[train,tpu,ray] in ~/.venv. Each host is one
# worker with its own chips; the sweep runs on the first host. Run it again to resume.

# The two lines to change: names of TPU VMs in a zone, and the sweep. Its output_dir, model and data must be on
# storage that all hosts mount, such as Filestore.
TPUS="pod-1 pod-2"; ZONE=us-central1-a
SWEEP="loraplus sweep /mnt/data/config.yaml --output_dir /mnt/data/runs/sweep"

set -euo pipefail
on() { gcloud compute tpus tpu-vm ssh "$1" --zone "$ZONE" --worker "$2" --command "$3"; }
# Each host is a slice of its own, of 4 chips, so that hosts do not wait for each other.
env="export PATH=\$HOME/.venv/bin:\$PATH RAY_USAGE_STATS_ENABLED=0 TPU_VISIBLE_CHIPS=0,1,2,3"
env="$env TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1"
first=${TPUS%% *}
for tpu in $TPUS; do on "$tpu" all "$env; ray stop --force"; done
on "$first" 0 "$env; ray start --head --port 6379 --include-dashboard false"
ip=$(on "$first" 0 "hostname -I" | awk '{print $1}')
for tpu in $TPUS; do  # all hosts but the first, which has started
  on "$tpu" all "$env; hostname -I | grep -qw $ip || ray start --address $ip:6379"
done
on "$first" 0 "$env; $SWEEP --sweep.ray $ip:6379"
