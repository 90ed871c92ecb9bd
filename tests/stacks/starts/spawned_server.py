"""slime, miles, NeMo-RL, UniRL: an actor spawns a process that runs SGLang's HTTP server.

NeMo-RL passes SGLang a fixed list of arguments, without any for speculation.
"""

from __future__ import annotations

from typing import Any

from tests.stacks.starts.asking import arguments, ask_spawned


def serve(values: dict[str, Any]) -> None:
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    launch_server(ServerArgs(**values))


def main() -> None:
    values, prompt = arguments()
    ask_spawned(serve, values, values["port"], prompt)


if __name__ == "__main__":
    main()
