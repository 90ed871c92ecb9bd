#!/usr/bin/env bash
# An engine for a stack that connects to running servers: slime, miles, AReaL (docs/rl-stacks.md).
#
# SGLang and TLT are installed here alone; the stack keeps its own SGLang, and needs nothing of TLT.
#
#   MODEL=/models/policy PORT=30000 launch/external-engine.sh
#   DRAFTER=/models/eagle3 ... launch/external-engine.sh   # with a learned drafter
#   MODEL=smollm2-135m HOST=127.0.0.1 launch/external-engine.sh   # to try it on a machine without a GPU
#
# Further flags are passed on: --tlt-store FOLDER for a drafter that learns during the run. miles
# compares the address: set HOST to the one that it is given.
#
# Then, on the side of the stack, one of:
#
#   slime:  --rollout-external-engine-addrs HOST:30000
#   miles:  --rollout-external --rollout-external-engine-addrs HOST:30000
#   AReaL:  export AREAL_LLM_SERVER_ADDRS=HOST:30000
set -euo pipefail
: "${MODEL:?set MODEL to the folder of the policy}"

args=(
  --model "$MODEL"
  --adaptive-spec                          # TLT on
  --host "${HOST:-0.0.0.0}"
  --port "${PORT:-30000}"
  --tlt-client-timeout-s 600               # frees what a trainer that died has left open
)
if [ -n "${DRAFTER:-}" ]; then args+=(--speculative-draft-model-path "$DRAFTER"); fi
exec python -m tlt_sglang.launch_server "${args[@]}" "$@"
