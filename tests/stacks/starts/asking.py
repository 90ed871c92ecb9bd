"""Ask a started server, for the programs here, and report what it answers."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import requests


def arguments() -> tuple[dict[str, Any], list[int]]:
    """Return SGLang's arguments and the prompt from the command line.

    A third word is TLT_CONFIG, for an actor that sets it after Python has started.
    """
    if len(sys.argv) > 3:
        os.environ["TLT_CONFIG"] = sys.argv[3]
    return json.loads(sys.argv[1]), json.loads(sys.argv[2])


def parameters() -> dict[str, Any]:
    """Return the sampling parameters of the one request."""
    return {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


def ask(url: str, prompt: list[int], alive: Callable[[], bool]) -> None:
    """Wait for the server, generate, and print the answer and the status of TLT."""
    while alive():
        try:
            if requests.get(f"{url}/health", timeout=5).ok:
                break
        except requests.RequestException:
            time.sleep(0.5)
    body = {"input_ids": prompt, "sampling_params": parameters()}
    answer = requests.post(f"{url}/generate", json=body, timeout=120).json()
    status = requests.get(f"{url}/tlt/status", timeout=60)
    report(answer["output_ids"], status.json() if status.ok else None)


def ask_spawned(
    serve: Callable[[Any], None], argument: object, port: int, prompt: list[int]
) -> None:
    """Ask a server that `serve` runs in a spawned process, and end that."""
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(argument,))
    server.start()
    try:
        ask(f"http://127.0.0.1:{port}", prompt, server.is_alive)
    finally:
        server.terminate()
        server.join()


def report(ids: list[int], status: object) -> None:
    """Print the result of the program."""
    print(json.dumps({"ids": ids, "status": status}), flush=True)
