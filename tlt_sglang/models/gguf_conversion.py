"""The conversion of a Llama-architecture GGUF file into a float32 Hugging Face folder.

Weights are dequantised, their rows brought into Hugging Face's order, and config and tokenizer
written from the file's metadata. Loads numpy, gguf and transformers only when it is called.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlt_sglang.errors import EnvironmentProblem

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]


def convert(gguf_file: Path, target: Path) -> None:
    """Write the Hugging Face folder of `gguf_file` into `target`.

    Raises EnvironmentProblem for a file of another architecture.
    """
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


def unpermute(weight: Array, heads: int) -> Array:
    """Undo llama.cpp's row order of ``q`` and ``k``: ``[heads * head_dim, hidden]`` both ways.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3) ... of a head, Hugging Face rotates row i
    with row i + head_dim / 2; its converter interleaves the two halves, this separates them.
    """
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


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
