"""Training checkpoints: the state that training changes, written while it continues.

They use torch.distributed.checkpoint asynchronously: training waits for the copy of trained weights
and optimizer state, not for the disk. Target, embedding, head and features are not part of them. A
checkpoint is a folder `step-00000120`, renamed to that name once it is complete; the newest two are
kept. Only the run that made them may load them, because the files contain pickles.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from tlt_sglang.errors import EnvironmentProblem

KEPT = 2
_UNFINISHED = ".tmp"


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # It warns at each save and load of a single process, from another thread.
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable", UserWarning)
        self._saving: tuple[Path, Future[Any]] | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Start writing a checkpoint, after the previous one is complete.

        Raises EnvironmentProblem if that one failed.
        """
        self.finish()
        path = self.folder / f"step-{step:08d}"
        temporary = path.with_name(path.name + _UNFINISHED)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if _first_rank():
                shutil.rmtree(temporary, ignore_errors=True)
            future = state_dict_saver.async_save(state, checkpoint_id=temporary)
        except OSError as error:
            raise self._problem(error) from error
        assert isinstance(future, Future)
        self._saving = (path, future)

    def finish(self) -> None:
        """Wait for the checkpoint being written, make it the newest, and remove old ones."""
        if self._saving is None:
            return
        (path, future), self._saving = self._saving, None
        temporary = path.with_name(path.name + _UNFINISHED)
        try:
            future.result()
            if _first_rank():
                shutil.rmtree(path, ignore_errors=True)
                temporary.rename(path)
                for old in self.all()[:-KEPT]:
                    shutil.rmtree(old)
        except (OSError, CheckpointException, RuntimeError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise self._problem(error) from error

    def all(self) -> list[Path]:
        """Return the complete checkpoints, the newest last."""
        paths = self.folder.glob("step-*")
        return sorted(path for path in paths if path.suffix != _UNFINISHED)

    def load(self, state: Callable[[], dict[str, Any]], restore: Callable[[Any], None]) -> bool:
        """Restore the newest state; return False where there is no checkpoint.

        `state` returns a state to fill in, `restore` takes it. Raises EnvironmentProblem for a
        damaged checkpoint.
        """
        for unfinished in self.folder.glob(f"step-*{_UNFINISHED}"):
            shutil.rmtree(unfinished, ignore_errors=True)
        if not (checkpoints := self.all()):
            return False
        filled = state()
        try:
            state_dict_loader.load(filled, checkpoint_id=checkpoints[-1])
            restore(filled)
        except (
            OSError,
            EOFError,
            KeyError,
            ValueError,
            RuntimeError,
            TypeError,
            AttributeError,
            pickle.UnpicklingError,
            CheckpointException,
        ) as error:
            raise EnvironmentProblem(
                f"The checkpoint {checkpoints[-1]} is damaged or of another run; delete it to use "
                "the one before, or its folder to start over."
            ) from error
        return True

    def _problem(self, error: BaseException) -> EnvironmentProblem:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip().rstrip(".")
        return EnvironmentProblem(
            f"A checkpoint cannot be written to {self.folder} ({reason}); make room, then start "
            "again: the last complete one is kept."
        )


def _first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
