"""The groups of settings: sections of docs/configuration.md and of `--help`, in their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Program = Literal["engine", "launcher", "sidecar", "coordinator"]


@dataclass(frozen=True)
class Group:
    """Settings that stand under one heading, and the programs that read them."""

    title: str
    intro: str
    used_by: tuple[Program, ...]


SPECULATION = Group(
    "Speculative decoding",
    "How the engine drafts and verifies, and how it chooses between strategies.",
    ("engine",),
)
CLIENTS = Group(
    "Clients",
    "What the engine does for RL stacks that update its weights.",
    ("engine",),
)
LOGS = Group("Logs", "What the engine writes about its decisions.", ("engine",))
DRAFTER = Group(
    "Adaptive drafter",
    "How an engine logs hidden states for training, and where it finds new drafter versions.",
    ("engine",),
)
COORDINATION = Group(
    "Coordinator",
    "How engines and trainers share a device. The engine reports to the coordinator, the sidecar "
    "obeys it, and `tlt coordinator` listens.",
    ("coordinator",),
)
SIDECAR = Group(
    "Sidecar",
    "How the drafter is trained while engines run, by `tlt sidecar` or beside the server.",
    ("sidecar",),
)
