#!/usr/bin/env bash
# Several CUDA GPUs of one machine by tensor parallelism.
#
# This script has not run on a GPU yet; the flags were read in the source of SGLang 0.5.23 (docs/gpu.md).
#
#   MODEL=Qwen/Qwen2.5-32B-Instruct DRAFTER=/path/to/eagle3 GPUS=4 launch/cuda-tensor-parallel.sh
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"

args=(
  --tp-size "${GPUS:-4}"                   # one scheduler process a GPU; the drafter is split as well
  --mem-fraction-static 0.85
)
exec "$here/cuda-one-gpu.sh" "${args[@]}" "$@"
