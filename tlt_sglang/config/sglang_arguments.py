"""From a TLT configuration to SGLang's own arguments.

SGLang resolves its arguments before most plugins load, and takes no new ones; so a strategy is
expressed in its `speculative_*` fields, and the CPU engine's defaults in its other ones. A field
that the user has set is kept, or refused where it contradicts the strategy. Pure but for reading
`config.json` files and the free memory. Runs wherever `ServerArgs` is resolved.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import psutil

from tlt_sglang.config.settings import Config, Device
from tlt_sglang.cpu import memory, ranks
from tlt_sglang.errors import ConfigError
from tlt_sglang.graphs.model_plan import plan_for_model
from tlt_sglang.models import drafter_checkpoint as checkpoint
from tlt_sglang.strategy.strategies import Strategy

DEFAULT_NGRAM = Strategy("ngram", num_draft_tokens=8)

DEFAULT_SHAPES = ("1x1x2", "3x1x4", "3x4x8")
"""Of a learned drafter, where strategies are chosen at every step and none are named."""

CALIBRATION = "tlt_calibration"
"""Our warm-up (`calibration`), as SGLang's --warmups has it."""

_TOO_EARLY = (
    "SGLang's arguments were resolved before TLT was loaded (call sglang.srt.plugins.load_plugins "
    "first, or give SGLang the strategy's speculative_* arguments yourself)"
)

SGLANG_NGRAM_CAPACITY = 10_000_000
"""Nodes of SGLang's n-gram corpus by default, all of them allocated at start: seconds on a CPU."""
NGRAM_CAPACITY = 1_000_000
"""And on CPU, where a server decodes a tenth of the tokens."""


class Arguments(Protocol):
    """The fields of SGLang's `ServerArgs` that are read here."""

    model_path: str
    device: str | None
    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    tp_size: int
    dp_size: int
    pp_size: int
    page_size: int | None
    max_total_tokens: int | None
    max_running_requests: int | None
    mem_fraction_static: float | None
    attention_backend: str | None
    speculative_algorithm: str | None
    speculative_draft_model_path: str | None
    speculative_num_steps: int | None
    speculative_eagle_topk: int | None
    speculative_num_draft_tokens: int | None
    speculative_ngram_capacity: int
    speculative_adaptive: bool
    speculative_use_rejection_sampling: bool
    warmups: str | None


def native_fields(config: Config, args: Arguments, device: Device) -> dict[str, Any]:
    """Fields of `args` to set before SGLang resolves them.

    Raises ConfigError for a drafter that is missing or made for another target, for contradictions,
    and for what the CPU engine does not serve.
    """
    if args.speculative_adaptive:
        raise ConfigError(
            "--speculative-adaptive is SGLang's own policy and contradicts --adaptive-spec; "
            "leave one of the two out."
        )
    fields = strategy_fields(choose(config, args), args)
    _check_limits(config, args)
    if args.speculative_use_rejection_sampling and config.draft_sampling == "on":
        # SGLang's has no trees and no drafters with a smaller vocabulary (`drafters.sampled`).
        fields["speculative_use_rejection_sampling"] = False
    if config.calibrates and CALIBRATION not in (args.warmups or "").split(","):
        fields["warmups"] = ",".join(filter(None, (args.warmups, CALIBRATION)))
    if device == "cpu":
        fields |= _cpu_fields(args)
    return fields


def _check_limits(config: Config, args: Arguments) -> None:
    """Refuse strategies beyond the KV pool or the drafter, and a budget without room for graphs.

    What cannot be told from files and flags alone is left to the engine.
    """
    path = args.speculative_draft_model_path
    drafter = None if path is None else checkpoint.read_config(path, "drafter")
    vocab = (drafter or {}).get("draft_vocab_size") or (drafter or {}).get("vocab_size")
    for arm in config.pool:
        if arm.drafter == "off":
            continue
        if arm.num_steps and isinstance(vocab, int) and arm.topk > vocab:
            raise ConfigError(
                f"Strategy {arm} keeps {arm.topk} branches, and the drafter {path!r} knows {vocab} "
                "tokens; lower TOPK."
            )
        requests = args.max_running_requests or 1
        slots = requests * max(arm.num_draft_tokens, arm.num_steps * arm.topk)
        if args.max_total_tokens is not None and slots > args.max_total_tokens:
            raise ConfigError(
                f"Strategy {arm} takes {slots} KV slots in a step of {requests} requests, and "
                f"--max-total-tokens {args.max_total_tokens} is all there are; raise it, or lower "
                "--max-running-requests."
            )
    budget = config.graph_memory_gb
    if budget is None or len(config.pool) < 2:
        return
    target = checkpoint.read_config(args.model_path, "model")
    if target is not None:
        known = vocab if isinstance(vocab, int) else None
        plan_for_model(
            config.pool, checkpoint.text_part(target), draft_vocab=known, budget_gb=budget
        )


def settle(config: Config, args: Arguments, device: Device) -> Config:
    """`config` with what it leaves open: the strategies, where several are the default (on CPU so
    far, and where a drafter is grown, which cannot draft from the start), and the sampling of
    drafts."""
    if config.draft_sampling == "auto" and args.speculative_use_rejection_sampling:
        config = dataclasses.replace(config, draft_sampling="on")
    if config.strategies or (device != "cpu" and config.store is None):
        return config
    return dataclasses.replace(config, strategies=default_pool(args))


def default_pool(args: Arguments) -> tuple[str, ...]:
    """The strategies of a server with a drafter, whose flags name none; else ().

    Raises ConfigError if the drafter is none that we know.
    """
    spoken = (
        args.speculative_algorithm,
        args.speculative_num_steps,
        args.speculative_eagle_topk,
        args.speculative_num_draft_tokens,
    )
    path = args.speculative_draft_model_path
    if path is None or any(flag is not None for flag in spoken):
        return ()
    drafter = checkpoint.read_config(path, "drafter")
    if drafter is None:
        return ()
    kind = checkpoint.drafter_kind(drafter, path)
    return ("off", *(f"{kind}:{shape}" for shape in DEFAULT_SHAPES), "ngram:8")


def check_resolved(config: Config, args: Arguments, device: Device) -> None:
    """Refuse arguments that were resolved before TLT was loaded and so miss its strategy."""
    strategy = config.strategy
    if strategy is None and args.speculative_algorithm is None:
        raise ConfigError(f"TLT_CONFIG is set, but {_TOO_EARLY}.")
    # SGLang turns EAGLE into an algorithm of its own for some drafters; that is not ours to judge.
    if strategy is not None and args.speculative_algorithm in (None, "NGRAM", "EAGLE", "EAGLE3"):
        for name, value in _wanted(strategy).items():
            if getattr(args, name) != value:
                raise ConfigError(
                    f"TLT_CONFIG asks for {strategy}, but {_TOO_EARLY}: {name} is "
                    f"{getattr(args, name)!r} in place of {value!r}."
                )
    if device == "cpu":
        _refuse_ranks(args)


def choose(config: Config, args: Arguments) -> Strategy | None:
    """The strategy to run; None where the user spelled it out in SGLang's own flags."""
    path = args.speculative_draft_model_path
    kind = None
    if path is not None:
        drafter = checkpoint.read_config(path, "drafter")
        target = checkpoint.read_config(args.model_path, "model")
        if drafter is not None:
            kind = checkpoint.drafter_kind(drafter, path)
            if target is not None:
                checkpoint.check_fits(target, drafter, path)
    strategy = config.strategy
    if strategy is None:
        if args.speculative_algorithm is not None:
            return None
        if path is None:
            return DEFAULT_NGRAM
        return Strategy(kind or "eagle", num_steps=3, topk=1, num_draft_tokens=4)
    if strategy.drafter in ("eagle", "eagle3"):
        if path is None:
            raise ConfigError(
                f"Strategy {strategy} needs a drafter: give --speculative-draft-model-path, or use "
                "ngram:8."
            )
        if kind is not None and kind != strategy.drafter:
            raise ConfigError(
                f"Strategy {strategy} does not fit the drafter {path!r}, which is {kind}; "
                f"write {kind}:{strategy.num_steps}x{strategy.topk}x{strategy.num_draft_tokens}."
            )
    return strategy


def strategy_fields(strategy: Strategy | None, args: Arguments) -> dict[str, Any]:
    """SGLang's speculative fields for `strategy`; refuses other values the user gave."""
    if strategy is None:
        return {}
    wanted = _wanted(strategy)
    for name, value in wanted.items():
        given = getattr(args, name)
        if given is not None and _as_sglang_reads(given) != str(value):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} {given} contradicts the strategy {strategy}; leave {flag} out."
            )
    fields = {name: value for name, value in wanted.items() if value is not None}
    if strategy.drafter in ("off", "ngram") and args.speculative_draft_model_path is not None:
        fields["speculative_draft_model_path"] = None
    return fields


def _wanted(strategy: Strategy) -> dict[str, Any]:
    """SGLang's fields that spell out `strategy`."""
    if strategy.drafter == "off":
        return {"speculative_algorithm": None}
    tokens = {"speculative_num_draft_tokens": strategy.num_draft_tokens}
    if strategy.drafter == "ngram":
        return {"speculative_algorithm": "NGRAM"} | tokens
    return {
        "speculative_algorithm": strategy.drafter.upper(),
        "speculative_num_steps": strategy.num_steps,
        "speculative_eagle_topk": strategy.topk,
        **tokens,
    }


def _as_sglang_reads(given: object) -> str:
    """A value as SGLang reads it: in capitals, and NEXTN is EAGLE."""
    text = str(given).upper()
    return "EAGLE" if text == "NEXTN" else text


def _cpu_fields(args: Arguments) -> dict[str, Any]:
    """What SGLang's CPU engine needs set, and limits that suit it."""
    _refuse_ranks(args)
    _refuse_formats(args)
    fields: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "attention_backend": "torch_native",
        "disable_cuda_graph": True,
        "sleep_on_idle": True,
    }
    if args.max_running_requests is not None and args.max_running_requests < 1:
        raise ConfigError(
            f"--max-running-requests {args.max_running_requests} serves nobody; give at least 1."
        )
    if args.max_running_requests is None:
        fields["max_running_requests"] = 16
    if args.speculative_ngram_capacity == SGLANG_NGRAM_CAPACITY:
        fields["speculative_ngram_capacity"] = NGRAM_CAPACITY
    model = checkpoint.read_config(args.model_path, "model")
    if model is not None:
        model = checkpoint.text_part(model)
        _refuse_model(model)
        _refuse_split(model, args.tp_size)
        if model.keys() >= memory.SHAPE:
            fields["max_total_tokens"] = _pool_tokens(model, args)
            if args.mem_fraction_static is None:
                # The pool's size is settled; SGLang takes what other programs use for ours.
                fields["mem_fraction_static"] = 0.95
    return fields


def _pool_tokens(model: dict[str, Any], args: Arguments) -> int:
    """Tokens for the KV pool of a local checkpoint, after its weights."""
    available = psutil.virtual_memory().available
    weights = checkpoint.float32_bytes(args.model_path, model)
    memory.check_weights(weights, available)
    return memory.pool_tokens(model, available - weights, args.max_total_tokens)


def _refuse_model(model: dict[str, Any]) -> None:
    layers = model.get("layer_types")
    problem = None
    if isinstance(layers, list) and any("sliding" in str(layer) for layer in layers):
        problem = "Models with sliding-window attention"
    elif model.get("quantization_config"):
        problem = "Quantised models"
    if problem:
        raise ConfigError(f"{problem} are not served on CPU; use another model, or a GPU.")


def _refuse_formats(args: Arguments) -> None:
    """Refuse what our CPU kernels, which are for float32 and single tokens, do not compute."""
    if args.page_size not in (None, 1):
        raise ConfigError(f"--page-size {args.page_size} is not served on CPU; use 1.")
    if args.dtype not in ("auto", "float32", "float"):
        raise ConfigError(f"--dtype {args.dtype} is not served on CPU; use float32.")
    if args.kv_cache_dtype != "auto":
        raise ConfigError(
            f"--kv-cache-dtype {args.kv_cache_dtype} is not served on CPU; leave it out."
        )
    if args.quantization is not None:
        raise ConfigError(f"--quantization {args.quantization} is not served on CPU; leave it out.")
    if args.attention_backend not in (None, "torch_native", "intel_amx"):
        raise ConfigError(
            f"--attention-backend {args.attention_backend} does not run on CPU; leave it out."
        )


def _refuse_ranks(args: Arguments) -> None:
    """Refuse more ranks than there are cores, and kinds of parallelism that CPUs do not serve."""
    cores = ranks.cores()
    if args.tp_size > len(cores):
        raise ConfigError(
            f"--tp-size {args.tp_size} needs a core for each rank and there are {len(cores)}; "
            "lower it."
        )
    for name, size in (("--dp-size", args.dp_size), ("--pp-size", args.pp_size)):
        if size > 1:
            raise ConfigError(
                f"{name} {size} is not served on CPU; start with {name} 1, and one server for each "
                "replica."
            )


def _refuse_split(model: dict[str, Any], tp_size: int) -> None:
    """Refuse a model whose parts do not split evenly over the ranks."""
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        count = model.get(name)
        if isinstance(count, int) and count % tp_size:
            raise ConfigError(
                f"--tp-size {tp_size} does not divide the model's {name}, {count}; choose one that "
                "does."
            )
