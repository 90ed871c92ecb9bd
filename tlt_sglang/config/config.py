"""The one configuration of a TLT engine, and the only reader of flags and environment.

SGLang starts its engine processes itself and its `ServerArgs` takes no foreign fields, so the
configuration travels in the environment: `TLT_CONFIG` names a TOML file (what an RL stack sets), or
holds the same fields as inline JSON (what our launcher sets). Where it is unset, TLT is off.

Runs in every process; imports nothing of SGLang.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tlt_sglang.errors import ConfigError
from tlt_sglang.strategy.arms import Strategy, envelope, parse

VARIABLE = "TLT_CONFIG"

Device = Literal["cpu", "cuda"]


PolicyName = Literal["cost-model", "beg-mab", "ema", "fixed", "random"]
DraftDtype = Literal["auto", "float32"]
DraftSampling = Literal["auto", "on", "off"]
Calibrate = Literal["on", "off"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


@dataclass(frozen=True)
class Config:
    """Settings of one engine. Every field has a default; a file names only what it changes."""

    strategies: tuple[str, ...] = ()
    """Strategies the engine may use, e.g. ["off", "eagle:3x1x4"]; empty: chosen from the
    drafter."""
    policy: PolicyName = "cost-model"
    """What chooses among several. `fixed`: the first of them; `random` is for tests."""
    max_batch: int | None = None
    """No speculation for more running requests than this."""
    ngram_memory_mb: int = 64
    """Of the n-gram index, where n-grams are among several strategies."""
    draft_dtype: DraftDtype = "auto"
    """Of the drafter on CPU. auto: weights in eight bits, read in a quarter of the time."""
    draft_sampling: DraftSampling = "auto"
    """Whether chains are drawn from the drafter's distribution for requests with a temperature.
    auto: on CPU, and on CUDA where SGLang's --speculative-use-rejection-sampling is given."""
    calibrate: Calibrate = "on"
    """Whether the cost model is told what every strategy costs before the server is ready."""
    backlog_mb: int = 128
    """Of features that wait for a drafter that is not used."""
    graph_memory_gb: float | None = None
    """Of captured graphs, by the plan's reckoning (`tlt plan`); None: as much as they take."""
    events: str | None = None
    """File that the event log is appended to."""
    trace: str | None = None
    """File for what the policy is asked and told, to replay it."""
    store: str | None = None
    """Folder of drafter versions: turns the harvest log and hot swap on."""
    grow: bool = False
    """Begin with n-grams and a drafter that is only a seed, whatever drafters there are."""
    harvest_gb: float = 0.25
    """Of the harvest log in shared memory; 0 writes none."""
    harvest_rate: float = 1.0
    """Fraction of requests that it takes."""
    coordinator: str | None = None
    """Its address; None: nobody is told what this engine has to do."""
    coordinator_key: str | None = None
    """File of the CURVE key, for tcp://."""
    device_name: str | None = None
    """What the coordinator calls this engine's device; None: after host and cores or GPU."""

    def __post_init__(self) -> None:
        pool = self.pool
        if pool and self.max_batch is not None and Strategy("off") not in pool:
            raise ConfigError("max_batch turns speculation off, and needs off among strategies.")
        if len(pool) < 2:
            return
        drafters = sorted({arm.drafter for arm in pool if arm.drafter in ("eagle", "eagle3")})
        if len(drafters) != 1:
            raise ConfigError(
                f"Several strategies ({', '.join(map(str, pool))}) need one kind of drafter, eagle "
                "or eagle3, among them; name one strategy, or add one of a drafter's."
            )
        if sum(arm.drafter == "ngram" for arm in pool) > 1:
            raise ConfigError(
                f"Among several strategies ({', '.join(map(str, pool))}) only one may be ngram."
            )

    @property
    def pool(self) -> tuple[Strategy, ...]:
        """The strategies that were asked for, each once."""
        return tuple(dict.fromkeys(parse(text) for text in self.strategies))

    @property
    def strategy(self) -> Strategy | None:
        """The strategy that was asked for, or one that is as large as all of them: what sizes
        SGLang's buffers. None to choose from the drafter."""
        pool = self.pool
        return envelope(pool) if pool else None

    @property
    def store_path(self) -> Path | None:
        """Of the store of drafter versions, if there is one."""
        return None if self.store is None else Path(self.store).expanduser()

    @property
    def calibrates(self) -> bool:
        """Whether there is something to calibrate."""
        return self.calibrate == "on" and self.policy == "cost-model" and len(self.pool) > 1

    @property
    def harvests(self) -> bool:
        """Whether what the target computes is logged."""
        return self.store is not None and self.harvest_gb > 0

    def to_json(self) -> str:
        """The inline form for `TLT_CONFIG`: strategies, and what is not as by default."""
        fields = dataclasses.asdict(self)
        standard = dataclasses.asdict(Config())
        return json.dumps(
            {k: v for k, v in fields.items() if k == "strategies" or v != standard[k]}
        )


_TEXTS = {
    "events": "the path of a file",
    "trace": "the path of a file",
    "store": "the path of a folder",
    "coordinator": "ipc:///FOLDER/NAME or tcp://HOST:PORT",
    "coordinator_key": "the path of a file",
    "device_name": "a name without blanks",
}


def from_environment(environ: Mapping[str, str] = os.environ) -> Config | None:
    """The configuration of this process, or None where TLT is off.

    Raises ConfigError for a file that cannot be read and for fields that are not ours.
    """
    value = environ.get(VARIABLE, "").strip()
    if not value:
        return None
    if value.startswith("{"):
        try:
            fields = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{VARIABLE} holds no valid JSON: {error}.") from error
        return from_fields(fields, f"The JSON in {VARIABLE}")
    return from_file(Path(value))


def from_file(path: Path) -> Config:
    """The configuration in a TOML file."""
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        fields = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"The TLT configuration {path} is not valid TOML: {error}.") from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise ConfigError(
            f"The TLT configuration {path} cannot be read ({reason}); give {VARIABLE} or "
            "--tlt-config the path of a TOML file."
        ) from error
    return from_fields(fields, str(path))


def from_fields(fields: Any, source: str) -> Config:
    """The configuration from a parsed mapping; `source` names it in errors."""
    known = [field.name for field in dataclasses.fields(Config)]
    if not isinstance(fields, dict):
        raise ConfigError(f"{source} must hold a table of settings, not a {type(fields).__name__}.")
    for name in fields:
        if name not in known:
            raise ConfigError(
                f"{source} has the unknown setting {name!r}; known ones: {', '.join(known)}."
            )
    strategies = fields.get("strategies", ())
    if isinstance(strategies, str):
        strategies = strategies.split(",")
    if not isinstance(strategies, (list, tuple)) or not all(
        isinstance(text, str) for text in strategies
    ):
        raise ConfigError(
            f"{source} gives {strategies!r} as strategies; write a list of strings, "
            'e.g. ["ngram:8"].'
        )
    policy = fields.get("policy", Config.policy)
    if policy not in POLICIES:
        raise ConfigError(
            f"{source} gives {policy!r} as policy; choose from {', '.join(POLICIES)}."
        )
    most = fields.get("max_batch")
    if most is not None and (type(most) is not int or most < 0):
        raise ConfigError(f"{source} gives {most!r} as max_batch; write a number of requests.")
    sizes = {n: fields.get(n, getattr(Config, n)) for n in ("ngram_memory_mb", "backlog_mb")}
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size <= 2**20:
            raise ConfigError(f"{source} gives {size!r} as {name}; write 1 or more.")
    budget = fields.get("graph_memory_gb")
    if budget is not None and (type(budget) not in (int, float) or not 0 < budget < 1e6):
        raise ConfigError(f"{source} gives {budget!r} as graph_memory_gb; write gigabytes.")
    texts = {name: fields.get(name) for name in _TEXTS}
    for name, text in texts.items():
        if text is not None and (not isinstance(text, str) or not text):
            raise ConfigError(f"{source} gives {text!r} as {name}; write {_TEXTS[name]}.")
    harvest_gb = _number(fields, "harvest_gb", 0, 1e6, "gigabytes, or 0 for no log", source)
    harvest_rate = _number(fields, "harvest_rate", 0, 1, "a fraction from 0 to 1", source)
    grow = fields.get("grow", False)
    if type(grow) is not bool:
        raise ConfigError(f"{source} gives {grow!r} as grow; write true or false.")
    if grow and texts["store"] is None:
        raise ConfigError(f"{source} asks to grow a drafter, which needs a store to grow in.")
    return Config(
        strategies=tuple(text.strip() for text in strategies),
        policy=policy,
        max_batch=most,
        ngram_memory_mb=sizes["ngram_memory_mb"],
        draft_dtype=_choice(fields, "draft_dtype", get_args(DraftDtype), source),
        draft_sampling=_choice(fields, "draft_sampling", get_args(DraftSampling), source),
        backlog_mb=sizes["backlog_mb"],
        graph_memory_gb=budget,
        grow=grow,
        calibrate=_choice(fields, "calibrate", get_args(Calibrate), source),
        harvest_gb=harvest_gb,
        harvest_rate=harvest_rate,
        **texts,
    )


def _choice(fields: dict[str, Any], name: str, known: tuple[str, ...], source: str) -> Any:
    value = fields.get(name, getattr(Config, name))
    if value not in known:
        words = f"{', '.join(known[:-1])} or {known[-1]}"
        raise ConfigError(f"{source} gives {value!r} as {name}; choose {words}.")
    return value


def _number(
    fields: dict[str, Any], name: str, least: float, most: float, what: str, source: str
) -> float:
    value = fields.get(name, getattr(Config, name))
    if type(value) not in (int, float) or not least <= value <= most:
        raise ConfigError(f"{source} gives {value!r} as {name}; write {what}.")
    return float(value)


def engine_device(environ: Mapping[str, str] = os.environ) -> Device:
    """Which of SGLang's engines this process runs: its CPU engine has to be asked for."""
    return "cpu" if environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1" else "cuda"
