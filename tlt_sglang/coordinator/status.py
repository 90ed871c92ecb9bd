"""The status of a coordinator: `tlt coordinator --status` prints it, and `tlt status` reads it."""

from __future__ import annotations

from pathlib import Path

import zmq

from tlt_sglang.coordinator import messages
from tlt_sglang.coordinator.connection import connect
from tlt_sglang.coordinator.location import Location
from tlt_sglang.errors import ConfigError


def query_status(
    endpoint: str, key: Path | None = None, wait: float = 2.0
) -> messages.Status | None:
    """Return the status of the coordinator at `endpoint`, or None without an answer in time.

    Blocks for at most `wait` seconds each way; meant for command lines, not for members.
    """
    context, socket = connect(Location(endpoint).address, key)
    try:
        socket.set(zmq.SNDTIMEO, int(1000 * wait))
        socket.set(zmq.RCVTIMEO, int(1000 * wait))
        socket.send(messages.encode(messages.StatusRequest()))
        message = messages.decode_coordinator_message(socket.recv())
    except zmq.Again:
        return None
    finally:
        socket.close()
        context.term()
    return message if isinstance(message, messages.Status) else None


def print_status(endpoint: str, key: Path | None) -> None:
    """Print the devices and members; raises ConfigError if no coordinator answers."""
    status = query_status(endpoint, key)
    if status is None:
        raise ConfigError(f"No coordinator answers at {endpoint}; start one: tlt coordinator.")
    for device, state in sorted(status.states.items()):
        print(f"{device:24} {state}")
    for name, role in sorted(status.members.items()):
        print(f"{name:24} {role}")
    print(
        f"tokens/s {status.tokens_per_s:.1f}, late stops {status.late}, malformed messages "
        f"{status.dropped}"
    )
    if status.stop_ms:
        ranked = sorted(status.stop_ms)
        last = ranked[min(len(ranked) - 1, int(0.99 * len(ranked)))]
        print(f"stops: p50 {ranked[len(ranked) // 2]:.1f} ms, p99 {last:.1f} ms of {len(ranked)}")
