#!/usr/bin/env bash
# TLT in the engines that a stack starts in its own processes, such as verl's (docs/rl-stacks.md).
#
# TLT is installed beside the stack's SGLang. Put this before the command that starts the training:
#
#   DRAFTER=/models/eagle3 launch/in-process.sh python -m verl.trainer.main_ppo ...
#
# The settings are in the file that TLT_CONFIG names, tlt.toml here if it is not set; a file that does
# not exist is written. Nodes of a Ray cluster that runs already do not see the variable: there, the
# stack passes it on, verl with +ray_kwargs.ray_init.runtime_env.env_vars.TLT_CONFIG=/shared/tlt.toml
set -euo pipefail
: "${1:?add the command that starts the training}"

export TLT_CONFIG="${TLT_CONFIG:-$PWD/tlt.toml}"
if [ ! -e "$TLT_CONFIG" ]; then
  {
    echo "# Settings of TLT: docs/configuration.md"
    if [ -n "${DRAFTER:-}" ]; then echo "drafter = \"$DRAFTER\""; fi
  } >"$TLT_CONFIG"
  echo "Wrote $TLT_CONFIG" >&2
fi
exec "$@"
