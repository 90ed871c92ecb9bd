"""A trainer that dies: `python -m tests.support.dying_client PORT STAGE`.

It brings the server to a stage, prints "ready" and does nothing more, so that a test can kill it:

- pause: generation is paused
- session: a weight-update session is open
- group: the server waits for a broadcast in a process group
- init: the server waits for a process group to be formed
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.update_group import GROUP, group_to_form

START_SECONDS = 60.0


@contextmanager
def client(port: int, stage: str) -> Iterator[subprocess.Popen[str]]:
    """Run a client up to a stage; it is killed with SIGKILL by the caller, or at the end."""
    command = [sys.executable, "-m", "tests.support.dying_client", str(port), stage]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def kill_at(port: int, stage: str) -> None:
    """Run a client up to a stage and kill it there."""
    with client(port, stage) as process:
        process.kill()


class Client:
    """The calls of a trainer."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def post(self, path: str, body: dict[str, Any]) -> None:
        """Post a JSON object."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), headers)
        urllib.request.urlopen(request).read()

    def begin(self, path: str, body: dict[str, Any]) -> None:
        """Post on a thread: the answer does not come before this process dies."""
        threading.Thread(target=self.post, args=(path, body), daemon=True).start()
        time.sleep(1)  # it has arrived

    def form(self, join: bool) -> None:
        """Ask the server to form a process group; with `join` it is formed."""
        if join:
            from tests.support.trainer import form
        port, body = group_to_form()
        self.begin("/init_weights_update_group", body)
        if join:
            self._group = form(port)

    def broadcast(self) -> None:
        """Announce a broadcast that never comes."""
        body = {"names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[576]]}
        self.begin("/update_weights_from_distributed", body | {"group_name": GROUP})


def main(port: int, stage: str) -> None:
    """Bring a server to a stage, and wait to be killed."""
    client = Client(port)
    if stage == "pause":
        client.post("/pause_generation", {})
    elif stage == "session":
        client.post("/begin_weight_update", {})
    elif stage == "init":
        client.form(join=False)
    else:
        client.form(join=True)
        client.broadcast()
    print("ready", flush=True)
    time.sleep(START_SECONDS)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
