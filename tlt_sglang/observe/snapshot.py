"""Snapshots of a server: its status and load, the sidecar's status, and the coordinator's devices.

Runs in `tlt top` and `tlt status`. It asks over HTTP and files, and changes nothing.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tlt_sglang.coordinator.status import query_status
from tlt_sglang.observe.events import Json


@dataclass(frozen=True)
class Snapshot:
    """The state of a server at one moment."""

    time: float
    """In seconds, by a monotonic clock."""
    status: Json | None
    """`GET /tlt/status`; None if the server does not answer."""
    load: Json
    """The first engine in `GET /v1/loads`."""
    sidecar: Json
    """STORE/sidecar.json."""
    devices: dict[str, str]
    """States of the coordinator's devices."""

    @property
    def scheduler(self) -> Json:
        """The first scheduler's part of the status."""
        first: Json = ((self.status or {}).get("schedulers") or [{}])[0]
        return first

    @property
    def tokens(self) -> int:
        """Tokens that all schedulers have committed since their start."""
        return sum(
            tally["verify_steps"] + tally["accepted"]
            for scheduler in (self.status or {}).get("schedulers") or []
            for tally in (scheduler.get("strategies") or {}).values()
        )


def tokens_per_s(now: Snapshot, before: Snapshot | None) -> float | None:
    """Return the committed tokens a second between two snapshots; None if either is missing."""
    if before is None or before.status is None or now.status is None or now.time <= before.time:
        return None
    return max(0.0, (now.tokens - before.tokens) / (now.time - before.time))


def take(url: str, key: str, coordinator: str | None) -> Snapshot:
    """Return a snapshot of the server at `url`, with its admin key; parts may be missing."""
    status = _get(f"{url}/tlt/status", key)
    loads = _get(f"{url}/v1/loads", key) or {}
    load: Json = (loads.get("loads") or [{}])[0]
    scheduler: Json = ((status or {}).get("schedulers") or [{}])[0]
    sidecar = _sidecar(Path(scheduler["store"])) if scheduler.get("store") else {}
    world = query_status(coordinator, wait=0.3) if coordinator else None
    devices = {} if world is None else world.states
    return Snapshot(time.monotonic(), status, load, sidecar, devices)


def _sidecar(store: Path) -> Json:
    try:
        status: Json = json.loads((store / "sidecar.json").read_text())
    except (OSError, ValueError):
        return {}
    return status


def _get(url: str, key: str) -> Json | None:
    request = urllib.request.Request(url)
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            payload: Json = json.load(response)
    except (OSError, ValueError, urllib.error.URLError):
        return None
    return payload
