"""The seed of a drafter, made of the target's last layer, to be trained while the engine runs.

It is an EAGLE-3 checkpoint like any other, so that SGLang builds the drafter at start and trained
versions can be swapped in without a restart. Before that it proposes no drafts.

Runs in the process that starts SGLang; the work is done by a process of its own, `tlt seed`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tlt_sglang.config.settings import Config
from tlt_sglang.errors import ConfigError
from tlt_sglang.models import drafter_checkpoint as checkpoint

SEED = "seed.json"
"""The file that marks a checkpoint as a seed."""


def grows(config: Config, args: Any) -> bool:
    """Return whether a drafter has to be made: there is a store, and the user names no drafter."""
    learned = not config.pool or any(arm.num_steps for arm in config.pool)
    named = args.speculative_draft_model_path or args.speculative_algorithm
    return config.store is not None and learned and not named


def make(model: str, config: Config) -> Path:
    """Return the folder of the seed for the target `model` in the store; make it if necessary.

    Raises ConfigError for a target without trainable drafters, or if the folder cannot be written.
    """
    assert config.store_path is not None
    if checkpoint.read_config(model, "model") is None:
        raise ConfigError(
            f"A drafter cannot be made for the hub id {model}; download the model and set "
            "--model to its folder."
        )
    path = str(Path(model).expanduser().resolve())
    folder = config.store_path / "seed"
    try:
        made_for = json.loads((folder / SEED).read_text())["target"]
    except (OSError, ValueError, KeyError):
        _run(["--model", path, "--out", str(folder)])
        return folder
    if made_for != path:
        raise ConfigError(
            f"The store {config.store} has a drafter for {made_for}, not for {path}; choose "
            "another --tlt-store."
        )
    return folder


def _run(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "tlt_sglang.cli", "seed", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["tlt seed failed without a message."]
        raise ConfigError(lines[-1].removeprefix("tlt seed: "))
