#!/usr/bin/env bash
# One CUDA GPU: an EAGLE-3 drafter, a chain of three, CUDA graphs, overlap scheduling.
#
# This script has not run on a GPU yet; the flags were read in the source of SGLang 0.5.23 (docs/gpu.md).
#
#   pip install "tlt-sglang[sglang]"   # brings stock SGLang with its CUDA stack
#   MODEL=meta-llama/Llama-3.1-8B-Instruct DRAFTER=/path/to/eagle3 launch/cuda-one-gpu.sh
set -euo pipefail
: "${MODEL:?set MODEL to a folder or hub id}" "${DRAFTER:?set DRAFTER to an EAGLE-3 checkpoint}"

args=(
  --model "$MODEL"
  --adaptive-spec                          # TLT on
  --tlt-strategies eagle3:3x1x4            # three draft steps, one branch, four tokens verified
  --speculative-draft-model-path "$DRAFTER"
  --device cuda
  --dtype bfloat16
  --attention-backend fa3                  # Hopper; flashinfer on older GPUs
  --mem-fraction-static 0.80               # leaves room for the drafter and its graphs
  --max-running-requests 64
  --cuda-graph-max-bs-decode 64            # graphs for every batch that can run
  --host 127.0.0.1
  --port 30000
)
exec python -m tlt_sglang.launch_server "${args[@]}" "$@"
