"""slime, miles, NeMo-RL, UniRL: an actor spawns a process that runs SGLang's HTTP server.

NeMo-RL passes SGLang a fixed list of arguments, without any for speculation.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

from tests.stacks.starts.asking import arguments, ask


def serve(values: dict[str, Any]) -> None:
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    launch_server(ServerArgs(**values))


def main() -> None:
    values, prompt = arguments()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(values,))
    server.start()
    try:
        ask(f"http://127.0.0.1:{values['port']}", prompt, server.is_alive)
    finally:
        server.terminate()
        server.join()


if __name__ == "__main__":
    main()
