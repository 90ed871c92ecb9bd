"""Write a result file with its origin: command, commit, machine and versions.

No absolute path goes into it: `portable` writes those of the repository relative to its root, those
of the user's home folder with `~`, and those of the temporary folder with `$TMPDIR`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import psutil

from benchmarks.harness.program import BenchmarkError

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"

Content = TypeVar("Content")


def result_path(benchmark: str, temperature: float = 0.0) -> Path:
    """Return the result file of a benchmark; sampled results have one apart from greedy ones."""
    return RESULTS / f"{benchmark}{'_sampled' if temperature else ''}.json"


def document(
    benchmark: str, summary: Mapping[str, float | None], **content: object
) -> dict[str, object]:
    """Return the content of a result file: its origin, the summary, then `content`."""
    return {
        "benchmark": benchmark,
        "command": command(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git(),
        "machine": machine(),
        "versions": versions(),
        "summary": dict(summary),
        **content,
    }


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write `content` to `path`, whole or not at all, without absolute paths."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = json.dumps(portable(content), indent=1, ensure_ascii=False) + "\n"
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BenchmarkError(f"{path} could not be written: {error.strerror}.") from error


def portable(content: Content) -> Content:
    """Return JSON content in which no text holds a path of this machine."""
    prefixes = {
        str(REPOSITORY): ".",
        str(Path.home()): "~",
        tempfile.gettempdir(): "$TMPDIR",
    }
    prefixes.pop("/", None)
    return replace_prefixes(content, prefixes)


def replace_prefixes(content: Content, prefixes: Mapping[str, str]) -> Content:
    """Return JSON content in which each folder of `prefixes` has its short name, keys included.

    The repository itself has the short name `.`, which is left out before a slash.
    """
    if isinstance(content, str):
        text: str = content
        for folder in sorted(prefixes, key=len, reverse=True):
            short = prefixes[folder]
            start = rf"(?<![\w~.-]){re.escape(folder)}"
            text = re.sub(rf"{start}/", "" if short == "." else f"{short}/", text)
            text = re.sub(rf"{start}(?![\w.-])", short, text)
        return text  # type: ignore[return-value]
    if isinstance(content, Mapping):
        return {  # type: ignore[return-value]
            replace_prefixes(key, prefixes): replace_prefixes(value, prefixes)
            for key, value in content.items()
        }
    if isinstance(content, list | tuple):
        return [replace_prefixes(value, prefixes) for value in content]  # type: ignore[return-value]
    return content


def command(arguments: Sequence[str]) -> str:
    """Return the command line as a user types it in the root of the repository."""
    return portable(shlex.join(["python", *arguments]))


def git() -> dict[str, str | bool | None]:
    """Return the commit, and whether the working tree without results differs from it."""
    status = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _git(*arguments: str) -> str | None:
    try:
        process = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return process.stdout.strip() if process.returncode == 0 else None


def machine() -> dict[str, str | int | float | None]:
    """Return the CPU's model, its cores and the memory."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpu": model,
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of what is measured; None if it is not installed."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "sglang", "transformers", "tlt-sglang"):
        try:
            installed[name.replace("-", "_")] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name.replace("-", "_")] = None
    return installed
