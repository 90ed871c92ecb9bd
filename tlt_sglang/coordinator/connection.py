"""The socket with which a member, or a command line, reaches a coordinator.

It queues nothing for a coordinator that is not up, and connects again when one is.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import zmq

from tlt_sglang.coordinator import endpoints, messages
from tlt_sglang.errors import ConfigError

MAX_PENDING = 64
"""The number of messages in flight each way, and of instructions that a client keeps."""

Context = zmq.Context[zmq.Socket[bytes]]


def connect(address: str | None, key: Path | None) -> tuple[Context, zmq.Socket[bytes]]:
    """Return a socket that connects to `address`, if there is one yet, with a context of its own.

    Neither waits for a coordinator. Raises ConfigError for an address or a key that is not valid.
    """
    if address is not None:
        endpoints.check_endpoint(address)
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    for option, value in (
        (zmq.LINGER, 100),
        (zmq.SNDHWM, MAX_PENDING),
        (zmq.RCVHWM, MAX_PENDING),
        (zmq.MAXMSGSIZE, messages.MAX_REPLY_BYTES),
        # Nothing is queued for a coordinator that is not up.
        (zmq.IMMEDIATE, 1),
        (zmq.RECONNECT_IVL, 50),
        (zmq.RECONNECT_IVL_MAX, 500),
    ):
        socket.set(option, value)
    # The identity survives reconnections. ZMQ reserves those that begin with a zero byte.
    socket.set(zmq.ROUTING_ID, b"m" + uuid.uuid4().bytes)
    try:
        endpoints.secure(socket, key, server=False)
        if address is not None:
            socket.connect(address)
    except (zmq.ZMQError, ConfigError) as error:
        socket.close()
        context.term()
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"The coordinator's address {address!r} is not valid ({error.strerror}); write "
            "ipc:///FOLDER/NAME or tcp://HOST:PORT."
        ) from error
    return context, socket
