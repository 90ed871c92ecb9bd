#!/usr/bin/env bash
# A fleet on this machine: two engines with the small model and a trainer, on three nodes of a local Ray
# cluster. `make fleet` calls it. Ctrl-C ends everything.
#
#   launch/ray/local.sh
#   STORE=/tmp/my-store MODEL=/models/policy launch/ray/local.sh --engines 1 -- --max-running-requests 8
set -euo pipefail
store="${STORE:-$(mktemp -d /tmp/tlt-fleet.XXXX)}"
flags=()
if [[ " $* " != *" -- "* ]]; then flags=(-- --max-total-tokens 12288); fi

echo "The store is $store; from another shell:"
echo "  tlt top --fleet $store"
exec tlt fleet --tlt-store "$store" --model "${MODEL:-smollm2-135m}" --local-nodes 3 \
  --engines 2 --trainers 1 "$@" "${flags[@]}"
