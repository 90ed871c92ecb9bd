"""The plan of a fleet: its members, their places, and the command of each. Pure.

Members share a store, a folder that all nodes see. STORE/fleet/ has the plan itself, the key with
which everything between machines is encrypted, a log of each member, and `targets/`, one file for
each engine as Prometheus discovers it (file_sd).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from tlt_sglang.config.settings import SETTINGS
from tlt_sglang.errors import ConfigError

Kind = Literal["coordinator", "exporter", "engine", "trainer"]
NAMESPACE = "tlt"
"""The Ray namespace of all fleets."""
CACHE = f"/tmp/tlt-{os.getuid()}/versions"
"""The folder in which the engines of a node keep the versions that they have read."""
_MODULE = {
    "coordinator": ("tlt_sglang.cli", "coordinator"),
    "exporter": ("tlt_sglang.cli", "export"),
    "engine": ("tlt_sglang.launch_server",),
    "trainer": ("tlt_sglang.cli", "sidecar"),
}


@dataclass(frozen=True)
class Size:
    """The resources that one member takes of its node."""

    cpus: float = 1
    gpus: float = 0

    def resources(self) -> dict[str, float]:
        """Return it as Ray's bundles have it."""
        return {name: n for name, n in (("CPU", self.cpus), ("GPU", self.gpus)) if n}


@dataclass(frozen=True)
class Member:
    """A process of a fleet."""

    kind: Kind
    which: str = ""
    """The number of an engine or a trainer, the node of an exporter."""

    @property
    def name(self) -> str:
        """Return its name, which is unique in its fleet."""
        return f"{self.kind}-{self.which}" if self.which else self.kind


@dataclass(frozen=True)
class Plan:
    """A fleet."""

    name: str
    store: Path
    model: str | None
    """The model that engines serve; None where there are none."""
    engines: int = 1
    trainers: int = 0
    """Trainers with resources of their own. One publishes; the others help, and take its place."""
    engine: Size = Size()
    trainer: Size = Size()
    engine_flags: tuple[str, ...] = ()
    """Further flags of `launch_server`; with `--tlt-sidecar idle` a trainer shares its device."""
    trainer_flags: tuple[str, ...] = ()
    """Further flags of `tlt sidecar`."""
    protected: bool = True
    """True if engines take admin commands from those alone who have the key `admin_key`."""

    @property
    def folder(self) -> Path:
        """Return the folder of the fleet's own files."""
        return self.store / "fleet"

    @property
    def address_file(self) -> Path:
        """Return the file with the address of the coordinator, which may move."""
        return self.folder / "coordinator"

    @property
    def coordinator(self) -> str:
        """Return the address of the coordinator for its members."""
        return f"file://{self.address_file}"

    @property
    def file(self) -> Path:
        """Return the file with the plan, which is there while the fleet is."""
        return _file(self.store)

    @property
    def owners(self) -> Path:
        """Return the folder with a file for each member, which says who keeps it."""
        return self.folder / "keepers"

    @property
    def targets(self) -> Path:
        """Return the folder with the addresses of the engines that answer."""
        return self.folder / "targets"

    @property
    def public_key(self) -> Path:
        """Return the key of whoever takes part."""
        return self.folder / "keys" / "coordinator.key"

    @property
    def secret_key(self) -> Path:
        """Return the key of whoever listens."""
        return self.folder / "keys" / "coordinator.key_secret"

    @property
    def admin_key(self) -> Path:
        """Return the file with SGLang's --admin-api-key of all engines."""
        return self.folder / "keys" / "admin.key"

    @property
    def engine_config(self) -> Path:
        """Return the file with the same for SGLang's --config: `ps` shows flags to everybody."""
        return self.folder / "keys" / "engine.yaml"

    @property
    def has_admin_key(self) -> bool:
        """Return whether engines get that key: those that have one of their own do not."""
        names = {flag.partition("=")[0] for flag in self.engine_flags}
        return self.protected and not names & {"--config", "--api-key", "--admin-api-key"}

    def urls(self) -> dict[str, str]:
        """Return the address of each engine that answers, by its name."""
        addresses: dict[str, str] = {}
        for path in sorted(self.targets.glob("*.json")):
            with contextlib.suppress(OSError, ValueError, TypeError):
                (group,) = json.loads(path.read_text())
                addresses[path.stem] = f"http://{group['targets'][0]}"
        return addresses

    def actor(self, name: str) -> str:
        """Return the name of a member's actor; those of all fleets share a namespace."""
        return f"{self.name}/{name}"

    def placed(self) -> list[Member]:
        """Return the members that need resources, in the order of `bundles`."""
        engines = [Member("engine", str(i)) for i in range(self.engines)]
        return engines + [Member("trainer", str(i)) for i in range(self.trainers)]

    def bundles(self) -> list[dict[str, float]]:
        """Return the resources of each of `placed`."""
        return [self.engine.resources()] * self.engines + [self.trainer.resources()] * self.trainers

    def command(self, member: Member, host: str, port: int) -> list[str]:
        """Return the command of a member on the node `host`, where it may listen at `port`."""
        own: list[str]
        if member.kind == "coordinator":
            own = [SETTINGS["coordinator"].flag, f"tcp://{host}:{port}", *self._key(listens=True)]
        elif member.kind == "exporter":
            own = [*self._store(), "--address", f"tcp://{host}:{port}", *self._key(listens=True)]
        elif member.kind == "engine":
            assert self.model is not None
            own = ["--model", self.model, "--adaptive-spec", "--host", host, "--port", str(port)]
            own += [*self._store(), SETTINGS["store_cache"].flag, CACHE]
            own += [SETTINGS["coordinator"].flag, self.coordinator, *self._key(listens=False)]
            own += [SETTINGS["device_name"].flag, self.actor(member.name), "--enable-metrics"]
            own += ["--config", str(self.engine_config)] if self.has_admin_key else []
            own += self.engine_flags
        else:
            own = [*self._store(), *self._key(listens=False), *self.trainer_flags]
        return [sys.executable, "-m", *_MODULE[member.kind], *own]

    def _store(self) -> list[str]:
        return [SETTINGS["store"].flag, str(self.store)]

    def _key(self, *, listens: bool) -> list[str]:
        key = self.secret_key if listens else self.public_key
        return [SETTINGS["coordinator_key"].flag, str(key)]

    def to_json(self) -> bytes:
        """Return it as the store keeps it."""
        return msgspec.json.format(msgspec.json.encode(self, enc_hook=str), indent=1)

    @staticmethod
    def read(store: Path) -> Plan | None:
        """Return the plan of the fleet of a store, None without one. Raises ConfigError."""
        path = _file(store)
        try:
            return msgspec.json.decode(path.read_bytes(), type=Plan, dec_hook=_to_path)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"The plan {path} cannot be read; remove it, and start the fleet again."
            ) from error


def _file(store: Path) -> Path:
    return store / "fleet" / "plan.json"


def _to_path(kind: type, value: object) -> Path:
    return Path(str(value))
