"""The options of a run: kept in its folder, so that no other run continues it, and exported."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlt_sglang.errors import ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    from tlt_sglang.training.offline import TrainOptions


def options_json(options: TrainOptions) -> dict[str, Any]:
    """Return the options as JSON has them, without the output folder."""
    fields: dict[str, Any] = json.loads(json.dumps(asdict(options), default=str))
    del fields["out"]
    return fields


def check_same_run(work: Path, options: TrainOptions) -> None:
    """Write the options into `work`; raise ConfigError if a run with other options has it."""
    fields = options_json(options)
    path = work / "run.json"
    try:
        if path.exists():
            before = json.loads(path.read_text())
            other = sorted(k for k in fields if before.get(k) != fields[k] and k != "at_once")
            if other:
                raise ConfigError(
                    f"{options.out} holds a run with another {', '.join(other)}; use the same "
                    "options to continue it, or choose another --out."
                )
            return
        work.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(fields, indent=2) + "\n")
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"{path} cannot be used ({error}).") from error


def training_json(folder: Path | None) -> dict[str, Any] | None:
    """Return the training.json of the drafter that a run started from, if it has one."""
    if folder is None or not (folder / "training.json").exists():
        return None
    fields: dict[str, Any] = json.loads((folder / "training.json").read_text())
    return fields
