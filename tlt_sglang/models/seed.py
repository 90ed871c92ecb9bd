"""The seed of a drafter: of the target's own last layer, to be trained while the engine runs.

An EAGLE-3 checkpoint like any other, so that SGLang builds the drafter at start and its versions
can be swapped in later without a restart. It is not asked for drafts before that.

Runs in the process that starts SGLang; `tlt seed`, a process of its own, does the work.
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
"""File that marks a checkpoint as one."""


def grows(config: Config, args: Any) -> bool:
    """Whether the drafter is to be grown from the target: there is a store, and none is named."""
    learned = not config.pool or any(arm.num_steps for arm in config.pool)
    named = args.speculative_draft_model_path or args.speculative_algorithm
    return config.store is not None and learned and not named


def make(model: str, config: Config) -> Path:
    """The folder of the seed for the target `model`, in the store; made if it is not there.

    Raises ConfigError for a target that no drafter is trained for, or if it cannot be written.
    """
    assert config.store_path is not None
    if checkpoint.read_config(model, "model") is None:
        raise ConfigError(
            f"No drafter can be grown for {model}, which is no folder; download it, and give "
            "--model the folder."
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
            f"The store {config.store} holds a drafter for {made_for}, not for {path}; choose "
            "another --tlt-store."
        )
    return folder


def _run(words: list[str]) -> None:
    command = [sys.executable, "-m", "tlt_sglang.cli", "seed", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise ConfigError(said.removeprefix("tlt seed: "))
