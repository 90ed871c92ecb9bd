"""Addresses of a coordinator or an exporter, and who may reach it.

Used by both and by all their clients; sends nothing. An `ipc://` socket lies in a folder
that only its owner may enter. `tcp://` is encrypted with a CURVE key: whoever holds its public half
may join (it is never sent in the clear), so both files are private.
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

MAX_PATH_BYTES = 107
"""The longest path of a Unix socket."""


def default_endpoint() -> str:
    """Return the address of this user's coordinator on this machine."""
    return f"ipc:///tmp/tlt-{os.getuid()}/coordinator"


def check_endpoint(endpoint: str) -> None:
    """Check an address and make the private folder of its socket. Raises ConfigError."""
    if endpoint.startswith("tcp://"):
        return
    path = Path(endpoint.removeprefix("ipc://"))
    if not endpoint.startswith("ipc://") or not path.is_absolute():
        raise ConfigError(
            f"The address {endpoint!r} is not valid; write ipc:///FOLDER/NAME or tcp://HOST:PORT."
        )
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(
            f"The socket's path {path} is too long; use at most {MAX_PATH_BYTES} bytes."
        )
    _make_private(path.parent)


@contextmanager
def exclusive(endpoint: str) -> Iterator[None]:
    """Keep `endpoint` free to be bound inside the `with` block.

    Removes the socket of a killed coordinator. Raises ConfigError if a coordinator answers there.
    """
    if not endpoint.startswith("ipc://"):
        yield
        return
    path = Path(endpoint.removeprefix("ipc://"))
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Two that start at once would each take the other's socket for a dead one.
        fcntl.flock(folder, fcntl.LOCK_EX)
        if path.exists() and not path.is_socket():
            raise ConfigError(f"{path} is not a socket; choose another address.")
        if _answers(path):
            raise ConfigError(f"A process listens at {endpoint} already; stop it, or use it.")
        path.unlink(missing_ok=True)
        yield
    finally:
        os.close(folder)


def remove_socket(endpoint: str) -> None:
    """Unlink the socket; call this while it is bound, so that it cannot be another's."""
    if endpoint.startswith("ipc://"):
        Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)


def make_keys(folder: Path) -> tuple[Path, Path]:
    """Write new CURVE keys into `folder`, readable by the owner only.

    Returns the paths of the public and of the secret key. Raises ConfigError.
    """
    _make_private(folder)
    if (folder / "coordinator.key_secret").exists():
        raise ConfigError(f"{folder} holds keys already; choose another folder.")
    mask = os.umask(0o077)
    try:
        public, secret = zmq.auth.create_certificates(folder, "coordinator")
    except OSError as error:
        raise ConfigError(
            f"The keys cannot be written to {folder} ({error.strerror}); choose another folder."
        ) from error
    finally:
        os.umask(mask)
    return Path(public), Path(secret)


def secure(socket: zmq.Socket[bytes], key: Path | None, *, server: bool) -> None:
    """Encrypt `socket` with a key file; the server needs the secret one. Raises ConfigError."""
    if key is None:
        return
    try:
        public, secret = zmq.auth.load_certificate(key)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key} is not a key file; make keys with tlt coordinator --make-keys DIR."
        ) from error
    if server:
        if secret is None:
            raise ConfigError(f"{key} is a public key; who listens needs the secret one.")
        socket.curve_server, socket.curve_publickey, socket.curve_secretkey = True, public, secret
        return
    socket.curve_serverkey = public
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        stat = folder.stat()
    except OSError as error:
        raise ConfigError(
            f"The folder {folder} cannot be used ({error.strerror}); choose another."
        ) from error
    if stat.st_uid != os.getuid() or stat.st_mode & 0o077:
        raise ConfigError(
            f"The folder {folder} is open to others; chmod 700 it, or choose a private one."
        )


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
