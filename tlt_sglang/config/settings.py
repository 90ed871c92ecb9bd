"""The settings of TLT: of the engine, its sidecar and its coordinator, each written once.

The flags of every program, the check of a configuration file and docs/configuration.md are
generated from the fields of `Config`. Runs in every process; imports nothing of SGLang.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tlt_sglang.config.groups import (
    CLIENTS,
    COORDINATION,
    DRAFTER,
    LOGS,
    SIDECAR,
    SPECULATION,
    Program,
)
from tlt_sglang.config.kinds import SWITCH, choice, decimal, numbers, text, texts, whole
from tlt_sglang.config.setting import Setting, setting
from tlt_sglang.errors import ConfigError
from tlt_sglang.strategy.strategies import Strategy, envelope, parse

VARIABLE = "TLT_CONFIG"
"""The environment variable in which a configuration travels."""

Device = Literal["cpu", "cuda"]

PolicyName = Literal["cost-model", "beg-mab", "ema", "fixed", "random"]
DraftDtype = Literal["auto", "float32"]
Sampling = Literal["auto", "coupled", "target"]
Calibrate = Literal["on", "off"]
OlderClients = Literal["auto", "on", "off"]
SidecarMode = Literal["idle", "always"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)

_FILE = text("FILE", "write the path of a file")
_MEGABYTES = whole(1, 2**20, metavar="MB")
_MILLISECONDS = whole(1, 10**9, metavar="MS", remedy="write 1 or more milliseconds")


@functools.lru_cache(maxsize=16)  # several times in each decode step
def _pool(names: tuple[str, ...]) -> tuple[Strategy, ...]:
    return tuple(dict.fromkeys(map(parse, names)))


@dataclass(frozen=True)
class Config:
    """One configuration. Every setting has a default; a file names only what it changes."""

    strategies: tuple[str, ...] = setting(
        (),
        texts(
            "STRATEGY[,STRATEGY]",
            'write a list of strings, e.g. ["ngram:8"]',
        ),
        "Strategies that the engine may use: eagle:STEPSxTOPKxTOKENS, eagle3:STEPSxTOPKxTOKENS, "
        "ngram:TOKENS or off; of several, the best one for the batch is chosen at every step",
        SPECULATION,
        default_text="chosen to suit the drafter",
    )
    policy: PolicyName = setting(
        "cost-model",
        choice(POLICIES),
        "Policy that chooses between several strategies; fixed takes the first one, random is for "
        "tests",
        SPECULATION,
    )
    max_batch: int | None = setting(
        None,
        whole(0, remedy="write a number of requests"),
        "Largest number of running requests with speculation; needs off among the strategies",
        SPECULATION,
        default_text="decided by the policy",
    )
    ngram_memory_mb: int = setting(
        64,
        _MEGABYTES,
        "Memory for the n-gram index in MB, where n-grams are one of several strategies",
        SPECULATION,
    )
    draft_dtype: DraftDtype = setting(
        "auto",
        choice(get_args(DraftDtype)),
        "Data type of the drafter's weights on CPU; auto is 8-bit integers, with the same output",
        SPECULATION,
    )
    sampling: Sampling = setting(
        "auto",
        choice(get_args(Sampling)),
        "How tokens are sampled at a temperature, and drafts for them. coupled: target and drafter "
        "choose by the same noise, so that a seed gives the same answer with any strategy. "
        "target: the drafter's likeliest tokens are drafted, and the target samples. Both keep the "
        "output distribution. auto is coupled where SGLang's flags allow it, else target",
        SPECULATION,
    )
    calibrate: Calibrate = setting(
        "on",
        choice(get_args(Calibrate)),
        "Measurement of what each strategy costs before the server is ready, which takes some "
        "seconds; off learns the costs from the first requests",
        SPECULATION,
    )
    pending_memory_mb: int = setting(
        128,
        _MEGABYTES,
        "Memory for the hidden states of pending tokens in MB: those that a drafter has not "
        "processed because other strategies ran",
        SPECULATION,
    )
    graph_memory_gb: float | None = setting(
        None,
        decimal(0, 1e6, above=True, metavar="GB", remedy="write gigabytes"),
        "Memory for captured CUDA graphs in GB; if not all of them fit, those that add least to "
        "the expected throughput are left out, as tlt plan shows",
        SPECULATION,
        default_text="unlimited",
    )
    older_clients: OlderClients = setting(
        "auto",
        choice(get_args(OlderClients)),
        "Service for clients that were written for an older SGLang: weight updates without a "
        "session, /get_weight_version, and the former keys of meta_info. auto begins with the "
        "first such call; on adds the keys from the first answer",
        CLIENTS,
    )
    client_timeout_s: float | None = setting(
        None,
        decimal(0, 1e9, above=True, metavar="S", remedy="write seconds"),
        "Silence of a client in s after which the pause and the weight-update session that it has "
        "left open are ended, and its process groups left. It must be longer than any step in "
        "which a paused engine waits; engines that have released memory are not touched",
        CLIENTS,
        default_text="no limit",
    )
    events: str | None = setting(
        None,
        _FILE,
        "File to which the event log is appended, as JSON lines: changes of strategy, and "
        "statistics of each strategy per second",
        LOGS,
    )
    log_requests: bool = setting(
        False,
        SWITCH,
        "Add every answered request to the event log, with its seed and token ids, so that tlt "
        "replay can send it again; needs --tlt-events",
        LOGS,
    )
    trace: str | None = setting(
        None,
        _FILE,
        "File for the policy's inputs and choices, from which they can be replayed",
        LOGS,
    )
    drafter: str | None = setting(
        None,
        text("MODEL", "write the path of a folder, or a hub id"),
        "Drafter of the target, a folder or a hub id, for stacks that cannot pass "
        "--speculative-draft-model-path to SGLang",
        DRAFTER,
        default_text="the one of SGLang's arguments",
    )
    store: str | None = setting(
        None,
        text("DIR", "write the path of a folder"),
        "Folder of drafter versions, the weight store; an engine with a store logs hidden states "
        "for training and swaps new versions in",
        DRAFTER,
        used_by=("engine", "sidecar"),
    )
    store_cache: str | None = setting(
        None,
        text("DIR", "write the path of a folder"),
        "Folder of this machine in which its engines keep the versions that they use, so that each "
        "is read from a shared store once",
        DRAFTER,
        used_by=("engine",),
    )
    grow: bool = setting(
        False,
        SWITCH,
        "Start with n-grams and grow a drafter from the target's last layer, even if a trained "
        "drafter is available",
        DRAFTER,
    )
    harvest_gb: float | None = setting(
        None,
        decimal(0, 1e6, metavar="GB", remedy="write gigabytes, or 0 for no log"),
        "Shared memory for the harvest log in GB; 0 turns the log off",
        DRAFTER,
        default_text="room for 32,768 tokens of the target, from 0.25 to 2",
    )
    harvest_rate: float = setting(
        1.0,
        decimal(0, 1, metavar="F", remedy="write a fraction from 0 to 1"),
        "Fraction of requests whose hidden states are logged",
        DRAFTER,
    )
    coordinator: str | None = setting(
        None,
        text("ADDRESS", "write ipc:///FOLDER/NAME or tcp://HOST:PORT"),
        "Address of the coordinator: ipc:///FOLDER/NAME, tcp://HOST:PORT, or for its members "
        "file:///PATH, a file with the address",
        COORDINATION,
        used_by=("engine", "sidecar", "coordinator"),
    )
    coordinator_key: str | None = setting(
        None,
        _FILE,
        "CURVE key file for tcp://: the secret key for the coordinator and exporters, the public "
        "key for engines and trainers",
        COORDINATION,
        used_by=("engine", "sidecar", "coordinator"),
    )
    device_name: str | None = setting(
        None,
        text("NAME", "write a name without blanks"),
        "Name of the device at the coordinator",
        COORDINATION,
        default_text="the engine's host and GPU or cores",
        used_by=("engine", "sidecar"),
    )
    preempt_ms: int = setting(
        500,
        _MILLISECONDS,
        "Time limit in ms for a trainer to leave the device",
        COORDINATION,
        used_by=("sidecar", "coordinator"),
    )
    coordinator_threshold: int = setting(
        0,
        whole(0, 10**9, remedy="write a number of requests"),
        "Number of requests that may run while their device is used for training",
        COORDINATION,
    )
    coordinator_dwell_ms: int = setting(
        500,
        whole(0, 10**9, metavar="MS", remedy="write milliseconds"),
        "Idle time in ms before a device is given to training",
        COORDINATION,
    )
    coordinator_timeout_ms: int = setting(
        5000,
        _MILLISECONDS,
        "Silence in ms after which the coordinator forgets a member",
        COORDINATION,
    )
    sidecar: SidecarMode | None = setting(
        None,
        choice(get_args(SidecarMode)),
        "Train the drafter beside the server: only while the engine is idle, or always",
        SIDECAR,
        default_text="no training",
        used_by=("launcher",),
    )
    sidecar_memory_gb: float = setting(
        2.0,
        decimal(0, 1e6, above=True, metavar="GB", remedy="write more than 0 gigabytes"),
        "Memory for training data in GB",
        SIDECAR,
    )
    sidecar_threads: int = setting(
        1,
        whole(1, 4096),
        "Number of threads for training on CPU",
        SIDECAR,
    )
    sidecar_cores: tuple[int, ...] = setting(
        (),
        numbers("N[,N]", "write a list of core numbers, e.g. [0, 1]"),
        "Cores for training on CPU",
        SIDECAR,
        default_text="any",
    )
    sidecar_learning_rate: float = setting(
        1e-3,
        decimal(0, 1e3, above=True, metavar="LR", remedy="write a number greater than 0"),
        "Learning rate of the sidecar",
        SIDECAR,
    )
    sidecar_batch_tokens: int = setting(
        256,
        whole(1, 10**9),
        "Largest number of tokens in a micro-batch",
        SIDECAR,
    )
    sidecar_gate_steps: int = setting(
        40,
        whole(1, 10**9),
        "Number of optimizer steps between two gates, at which a better drafter is published",
        SIDECAR,
    )
    sidecar_seed: int = setting(
        0,
        whole(0, 2**63 - 1),
        "Seed of the random numbers in training",
        SIDECAR,
    )
    sidecar_tensorboard: bool = setting(
        False,
        SWITCH,
        "Write TensorBoard scalars to STORE/tensorboard",
        SIDECAR,
    )

    def __post_init__(self) -> None:
        pool = self.pool
        if pool and self.max_batch is not None and Strategy("off") not in pool:
            raise ConfigError("max_batch turns speculation off, and needs off among strategies.")
        if len(pool) < 2:
            return
        drafters = {strategy.drafter for strategy in pool} & {"eagle", "eagle3"}
        if len(drafters) != 1:
            raise ConfigError(
                f"Several strategies ({', '.join(map(str, pool))}) need one kind of drafter, eagle "
                "or eagle3, among them; name one strategy, or add one of a drafter's."
            )
        if sum(strategy.drafter == "ngram" for strategy in pool) > 1:
            raise ConfigError(
                f"Among several strategies ({', '.join(map(str, pool))}) only one may be ngram."
            )

    @property
    def pool(self) -> tuple[Strategy, ...]:
        """The configured strategies, each once."""
        return _pool(self.strategies)

    @property
    def strategy(self) -> Strategy | None:
        """The configured strategy, or the envelope of several, which sizes SGLang's buffers.

        None where the drafter decides.
        """
        pool = self.pool
        return envelope(pool) if pool else None

    @property
    def store_path(self) -> Path | None:
        """The folder of the weight store; None without one."""
        return None if self.store is None else Path(self.store).expanduser()

    @property
    def store_cache_path(self) -> Path | None:
        """The folder of this machine's copies of versions; None without one."""
        return None if self.store_cache is None else Path(self.store_cache).expanduser()

    @property
    def calibrates(self) -> bool:
        """True if the engine measures its strategies before the server is ready."""
        return self.calibrate == "on" and self.policy == "cost-model" and len(self.pool) > 1

    @property
    def harvests(self) -> bool:
        """True if the engine logs hidden states."""
        return self.store is not None and self.harvest_gb != 0

    def to_json(self) -> str:
        """Return the inline form for `TLT_CONFIG`: strategies, and settings without defaults."""
        fields = dataclasses.asdict(self)
        defaults = dataclasses.asdict(Config())
        return json.dumps(
            {k: v for k, v in fields.items() if k == "strategies" or v != defaults[k]}
        )


SETTINGS: dict[str, Setting] = {
    field.name: Setting(field.name, field.default, **field.metadata)
    for field in dataclasses.fields(Config)
}
"""Every setting by its name, in the order of the page."""


def settings_for(program: Program) -> list[Setting]:
    """Return the settings that `program` reads."""
    return [one for one in SETTINGS.values() if program in one.used_by]
