"""Where a coordinator is found, and who may reach it.

An `ipc://` socket lies in a folder that only its owner may enter. On `tcp://` a CURVE key encrypts:
whoever holds its public half may join (it is never sent in the clear), so both files are private.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq
import zmq.auth

from tlt_sglang.errors import ConfigError

MOST_PATH = 107
"""Bytes of a Unix socket's path."""


def default_endpoint() -> str:
    """Of this user, on this machine."""
    return f"ipc:///tmp/tlt-{os.getuid()}/coordinator"


def checked(endpoint: str) -> str:
    """`endpoint`, whose socket's folder is there and private. Raises ConfigError."""
    if endpoint.startswith("tcp://"):
        return endpoint
    path = Path(endpoint.removeprefix("ipc://"))
    if not endpoint.startswith("ipc://") or not path.is_absolute():
        raise ConfigError(
            f"The coordinator's address {endpoint!r} is not possible; write "
            "ipc:///FOLDER/NAME or tcp://HOST:PORT."
        )
    if len(os.fsencode(path)) > MOST_PATH:
        raise ConfigError(f"The socket's path {path} is too long; use {MOST_PATH} bytes at most.")
    _make_private(path.parent)
    return endpoint


@contextmanager
def vacant(endpoint: str) -> Iterator[None]:
    """Bind `endpoint` within: what a killed coordinator left is gone, and no live one is robbed.

    Raises ConfigError where one answers.
    """
    if not endpoint.startswith("ipc://"):
        yield
        return
    path = Path(endpoint.removeprefix("ipc://"))
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Two that start at once would each find the other's socket dead.
        fcntl.flock(folder, fcntl.LOCK_EX)
        if path.exists() and not path.is_socket():
            raise ConfigError(f"{path} is no socket; give the coordinator another address.")
        if _answers(path):
            raise ConfigError(f"A coordinator runs at {endpoint} already; stop it, or use it.")
        path.unlink(missing_ok=True)
        yield
    finally:
        os.close(folder)


def removed(endpoint: str) -> None:
    """Unlink the socket, which is still bound: nobody else can have taken its place."""
    if endpoint.startswith("ipc://"):
        Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)


def make_keys(folder: Path) -> tuple[Path, Path]:
    """New CURVE keys in `folder`, owner-only: (public, secret). Raises ConfigError."""
    _make_private(folder)
    if (folder / "coordinator.key_secret").exists():
        raise ConfigError(f"{folder} holds keys already; name another folder.")
    mask = os.umask(0o077)
    try:
        public, secret = zmq.auth.create_certificates(folder, "coordinator")
    except OSError as error:
        raise ConfigError(f"No keys can be written to {folder} ({error.strerror}).") from error
    finally:
        os.umask(mask)
    return Path(public), Path(secret)


def secure(socket: zmq.Socket[bytes], key: Path | None, *, server: bool) -> None:
    """Encrypt what goes over `socket` with the key file: the secret one at the server."""
    if key is None:
        return
    try:
        public, secret = zmq.auth.load_certificate(key)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key} is no key; make some with tlt coordinator --make-keys DIR."
        ) from error
    if server:
        if secret is None:
            raise ConfigError(f"{key} is a public key; the coordinator needs the secret one.")
        socket.curve_server, socket.curve_publickey, socket.curve_secretkey = True, public, secret
        return
    socket.curve_serverkey = public
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
    except OSError as error:
        raise ConfigError(
            f"The folder {folder} cannot be used ({error.strerror}); name another."
        ) from error
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise ConfigError(
            f"The folder {folder} is open to others; chmod 700 it, or name one that is yours alone."
        )


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
