#!/usr/bin/env bash
# A fleet as a Slurm job: a Ray head on the first node, a worker on each other one. Has not run yet.
#
#   MODEL=/models/policy STORE=/shared/drafters/policy sbatch --nodes 4 launch/ray/slurm.sh
#SBATCH --job-name=tlt-fleet
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
set -euo pipefail
: "${MODEL:?set MODEL to the folder of the policy}" "${STORE:?set STORE to a folder that all nodes see}"
gpus="${SLURM_GPUS_ON_NODE:-8}"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}"
address="$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}'):6379"

srun --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --node-ip-address="${address%:*}" --port=6379 --num-gpus="$gpus" --block &
sleep 20
for node in "${nodes[@]:1}"; do
  srun --nodes=1 --ntasks=1 --nodelist="$node" \
    ray start --address="$address" --num-gpus="$gpus" --block &
done
sleep 20

# The fleet's program and its manager are on the head node; Slurm's SIGTERM ends the fleet.
exec srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
  tlt fleet --ray "$address" --tlt-store "$STORE" --model "$MODEL" \
  --engines "${ENGINES:-$((${#nodes[@]} * gpus - 1))}" --engine-gpus 1 --trainers 1 --trainer-gpus 1 "$@"
