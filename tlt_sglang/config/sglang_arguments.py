"""Translate a TLT configuration into SGLang's own arguments.

SGLang resolves its arguments before most plugins load, and takes no new ones. A strategy is
therefore expressed in its `speculative_*` fields, and the CPU engine's defaults in other fields
(`cpu_arguments`). A field that the user has set is kept, or refused if it contradicts the strategy.
The functions are pure, except that they read `config.json` files and the free memory. Runs wherever
`ServerArgs` is resolved.
"""

from __future__ import annotations

import dataclasses

from tlt_sglang.config.cpu_arguments import cpu_fields, refuse_ranks
from tlt_sglang.config.cuda_arguments import cuda_fields
from tlt_sglang.config.refusals import require_use
from tlt_sglang.config.refused import exclude, refuse_drafter, refuse_flags
from tlt_sglang.config.server_args import Arguments, Fields
from tlt_sglang.config.settings import Config, Device, Sampling
from tlt_sglang.errors import ConfigError
from tlt_sglang.graphs.model_plan import plan_for_model
from tlt_sglang.models import drafter_checkpoint as checkpoint
from tlt_sglang.strategy.strategies import Strategy

DEFAULT_NGRAM = Strategy("ngram", num_draft_tokens=8)

DEFAULT_SHAPES = ("1x1x2", "3x1x4", "3x4x8")
"""Default strategies of a learned drafter, besides plain decoding and n-grams."""

CALIBRATION = "tlt_calibration"
"""The name of our warm-up in SGLang's --warmups; it measures what each strategy costs."""

_TOO_EARLY = (
    "SGLang's arguments were resolved before TLT was loaded (call sglang.srt.plugins.load_plugins "
    "first, or give SGLang the strategy's speculative_* arguments yourself)"
)


def native_fields(config: Config, args: Arguments, device: Device) -> Fields:
    """Return the fields of `args` to set before SGLang resolves them.

    Raises ConfigError for a drafter that is missing or made for another target, for contradictions,
    and for options that the CPU engine does not serve.
    """
    if args.speculative_adaptive:
        raise ConfigError(
            "--speculative-adaptive is SGLang's own policy and contradicts --adaptive-spec; "
            "leave one of the two out."
        )
    refuse_flags(config, args, device)
    strategy = choose(config, args)
    require_use(config, strategy)
    fields = strategy_fields(strategy, args)
    _check_limits(config, args, device)
    if config.calibrates and CALIBRATION not in (args.warmups or "").split(","):
        fields["warmups"] = ",".join(filter(None, (args.warmups, CALIBRATION)))
    return fields | (cpu_fields(args) if device == "cpu" else cuda_fields(config, args))


def _check_limits(config: Config, args: Arguments, device: Device) -> None:
    """Refuse drafters that a feature excludes, strategies beyond the KV pool or the drafter, and
    too little memory for graphs.

    Limits that files and flags do not show are left to the engine.
    """
    # A tree cannot be wider than the drafter's vocabulary, nor a step larger than the KV pool.
    path = args.speculative_draft_model_path
    drafter = (None if path is None else checkpoint.read_config(path, "drafter")) or {}
    refuse_drafter(config, drafter, device)
    vocab = drafter.get("draft_vocab_size") or drafter.get("vocab_size")
    draft_vocab = vocab if isinstance(vocab, int) else None
    for strategy in config.pool:
        if strategy.drafter == "off":
            continue
        if strategy.num_steps and draft_vocab is not None and strategy.topk > draft_vocab:
            raise ConfigError(
                f"Strategy {strategy} keeps {strategy.topk} branches, but the vocabulary of the "
                f"drafter {path!r} has {draft_vocab} tokens; lower TOPK."
            )
        requests = args.max_running_requests or 1
        slots = requests * max(strategy.num_draft_tokens, strategy.num_steps * strategy.topk)
        if args.max_total_tokens is not None and slots > args.max_total_tokens:
            raise ConfigError(
                f"Strategy {strategy} takes {slots} KV slots in a step of {requests} requests, but "
                f"--max-total-tokens is {args.max_total_tokens}; raise it, or lower "
                "--max-running-requests."
            )

    # The plan raises ConfigError where the graphs of plain decoding alone do not fit.
    budget = config.graph_memory_gb
    if budget is None or len(config.pool) < 2:
        return
    target = checkpoint.read_config(args.model_path, "model")
    if target is not None:
        shape = checkpoint.text_part(target)
        plan_for_model(config.pool, shape, draft_vocab=draft_vocab, budget_gb=budget)


def settle(config: Config, args: Arguments, device: Device) -> Config:
    """Return `config` with its open settings filled in: the strategies and the sampling.

    Several strategies are the default on CPU, and wherever there is a store: a drafter that is
    being grown cannot draft from the start.
    """
    if config.sampling == "auto":
        config = dataclasses.replace(config, sampling=_default_sampling(args, device))
    if config.strategies or (device != "cpu" and config.store is None):
        return config
    return dataclasses.replace(config, strategies=default_pool(args))


def _default_sampling(args: Arguments, device: Device) -> Sampling:
    return "target" if exclude("sampling", args, device) else "coupled"


def default_pool(args: Arguments) -> tuple[str, ...]:
    """Return the strategies of a server with a drafter, where the flags name no strategy; else ().

    Raises ConfigError for an unknown kind of drafter.
    """
    speculative = (
        args.speculative_algorithm,
        args.speculative_num_steps,
        args.speculative_eagle_topk,
        args.speculative_num_draft_tokens,
    )
    path = args.speculative_draft_model_path
    if path is None or any(value is not None for value in speculative):
        return ()
    drafter = checkpoint.read_config(path, "drafter")
    if drafter is None:
        return ()
    kind = checkpoint.drafter_kind(drafter, path)
    learned = [f"{kind}:{shape}" for shape in DEFAULT_SHAPES]
    return ("off", *learned, "ngram:8")


def check_resolved(config: Config, args: Arguments, device: Device) -> None:
    """Refuse arguments that were resolved before TLT was loaded, and so lack its strategy.

    SGLang may also have set what excludes a feature of TLT.
    """
    strategy = config.strategy
    if strategy is None and args.speculative_algorithm is None:
        raise ConfigError(f"TLT_CONFIG is set, but {_TOO_EARLY}.")
    # For some drafters SGLang replaces EAGLE by an algorithm of its own, which is left alone.
    if strategy is not None and args.speculative_algorithm in (None, "NGRAM", "EAGLE", "EAGLE3"):
        for name, value in _required(strategy).items():
            if getattr(args, name) != value:
                raise ConfigError(
                    f"TLT_CONFIG asks for {strategy}, but {_TOO_EARLY}: {name} is "
                    f"{getattr(args, name)!r} in place of {value!r}."
                )
    require_use(config, None)
    refuse_flags(config, args, device)
    if device == "cpu":
        refuse_ranks(args)


def choose(config: Config, args: Arguments) -> Strategy | None:
    """Return the strategy to run; None where SGLang's own flags spell it out.

    Raises ConfigError for a drafter that does not fit the target or the strategy.
    """
    # A drafter is checked whatever the strategy.
    path = args.speculative_draft_model_path
    kind = None
    if path is not None:
        drafter = checkpoint.read_config(path, "drafter")
        target = checkpoint.read_config(args.model_path, "model")
        if drafter is not None:
            kind = checkpoint.drafter_kind(drafter, path)
            if target is not None:
                checkpoint.check_fits(target, drafter, path)

    # The configured strategy, or the default for the drafter.
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


def strategy_fields(strategy: Strategy | None, args: Arguments) -> Fields:
    """Return SGLang's speculative fields for `strategy`; raises ConfigError for other values."""
    if strategy is None:
        return {}
    required = _required(strategy)
    for name, value in required.items():
        present = getattr(args, name)
        if present is not None and _as_sglang_reads(present) != str(value):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} {present} contradicts the strategy {strategy}; leave {flag} out."
            )
    fields: Fields = {name: value for name, value in required.items() if value is not None}
    if strategy.drafter in ("off", "ngram") and args.speculative_draft_model_path is not None:
        fields["speculative_draft_model_path"] = None
    return fields


def _required(strategy: Strategy) -> Fields:
    """Return SGLang's fields that spell out `strategy`."""
    if strategy.drafter == "off":
        return {"speculative_algorithm": None}
    tokens: Fields = {"speculative_num_draft_tokens": strategy.num_draft_tokens}
    if strategy.drafter == "ngram":
        return {"speculative_algorithm": "NGRAM", **tokens}
    return {
        "speculative_algorithm": strategy.drafter.upper(),
        "speculative_num_steps": strategy.num_steps,
        "speculative_eagle_topk": strategy.topk,
        **tokens,
    }


def _as_sglang_reads(value: object) -> str:
    """Return a value as SGLang reads it: in capitals, and NEXTN is EAGLE."""
    text = str(value).upper()
    return "EAGLE" if text == "NEXTN" else text
