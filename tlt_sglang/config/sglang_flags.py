"""SGLang's flags, as far as our checks need them, read before SGLang is imported.

Importing SGLang takes seconds; this module lets the launcher refuse a bad flag at once. A flag that
cannot be read here (its value is not a number, or it stands in a YAML file) is left to SGLang, and
the same checks run again on SGLang's own arguments. Only `check` imports SGLang. Runs in the
launcher.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tlt_sglang.config.command_line import Parser


@dataclass
class Flags:
    """Fields of SGLang's `ServerArgs`, with its defaults; see `sglang_arguments.Arguments`."""

    model_path: str = ""
    host: str = "127.0.0.1"
    port: str = "30000"
    device: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    tokenizer_worker_num: int = 1
    tp_size: int = 1
    dp_size: int = 1
    attn_dp_size: int = 1
    enable_dp_attention: bool = False
    pp_size: int = 1
    page_size: int | None = None
    context_length: int | None = None
    chunked_prefill_size: int | None = None
    max_total_tokens: int | None = None
    max_running_requests: int | None = None
    mem_fraction_static: float | None = None
    attention_backend: str | None = None
    disable_overlap_schedule: bool = False
    enable_memory_saver: bool = False
    speculative_algorithm: str | None = None
    speculative_draft_model_path: str | None = None
    speculative_num_steps: int | None = None
    speculative_eagle_topk: int | None = None
    speculative_num_draft_tokens: int | None = None
    speculative_ngram_capacity: int = 10_000_000
    speculative_adaptive: bool = False
    speculative_use_rejection_sampling: bool = False
    speculative_use_block_verification: bool = False
    speculative_accept_threshold_single: float = 1.0
    speculative_accept_threshold_acc: float = 1.0
    speculative_draft_model_quantization: str | None = None
    enable_multi_layer_eagle: bool = False
    enable_two_batch_overlap: bool = False
    enable_mixed_chunk: bool = False
    enable_pdmux: bool = False
    enable_lora: bool = False
    lora_paths: str | None = None
    disaggregation_mode: str = "null"
    rl_on_policy_target: str | None = None
    warmups: str | None = None


_ALIASES = {
    "model_path": ["--model"],
    "tp_size": ["--tensor-parallel-size", "--tp"],
    "dp_size": ["--data-parallel-size", "--dp"],
    "attn_dp_size": ["--attention-data-parallel-size"],
    "pp_size": ["--pipeline-parallel-size", "--pp"],
    "speculative_draft_model_path": ["--speculative-draft-model"],
}


def read(argv: Sequence[str]) -> Flags:
    """Return the flags in `argv`; raises FlagError for a flag without its value."""
    parser = Parser("sglang serve")
    flags = Flags()
    for name, default in vars(flags).items():
        names = ["--" + name.replace("_", "-"), *_ALIASES.get(name, [])]
        if default is False:
            parser.add_argument(*names, dest=name, action="store_true")
        else:
            parser.add_argument(*names, dest=name)
    args, _ = parser.parse_known_args(list(argv))
    # A value that is not a number here is left to SGLang.
    for name, value in vars(args).items():
        kind = str(Flags.__annotations__[name])
        if isinstance(value, str) and "str" not in kind:
            value = _number(value, "float" in kind)
        if value is not None:
            setattr(flags, name, value)
    return flags


def flag_value(argv: Sequence[str], *names: str) -> str | None:
    """Return the last value of the flags `names` in `argv` (`--flag v` or `--flag=v`)."""
    value = None
    for i, word in enumerate(argv):
        for name in names:
            if word == name and i + 1 < len(argv):
                value = argv[i + 1]
            elif word.startswith(name + "="):
                value = word[len(name) + 1 :]
    return value


def check(argv: list[str]) -> None:
    """Raise FlagError for flags to which SGLang's parser answers with 200 lines of usage."""
    from sglang.srt.server_args import ServerArgs

    if flag_value(argv, "--config") is None:
        parser = Parser("sglang serve", allow_abbrev=True)
        ServerArgs.add_cli_args(parser)
        parser.parse_args(argv)


def _number(text: str, fraction: bool) -> int | float | None:
    if fraction and re.fullmatch(r"[0-9]{1,9}\.[0-9]{1,18}", text):
        return float(text)
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None
