"""TensorBoard scalars of a sidecar, one event file for each of its runs.

    tensorboard --logdir STORE/tensorboard

Runs in the sidecar. tensorboardX writes them, which needs neither TensorBoard nor TensorFlow.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tlt_sglang.errors import EnvironmentProblem


class Scalars:
    """Writes to `folder`; raises EnvironmentProblem if tensorboardX is missing."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise EnvironmentProblem(
                "--tlt-sidecar-tensorboard needs the package tensorboardX: pip install "
                "'tlt-sglang[tensorboard]'."
            ) from error
        self._writer = SummaryWriter(str(folder), flush_secs=10)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write `values` by name, at an optimizer step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is buffered, and close the file."""
        self._writer.close()
