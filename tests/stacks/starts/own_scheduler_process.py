"""AReaL: SGLang's arguments from a command line, and a scheduler process that loads no plugins."""

from __future__ import annotations

from typing import Any

from tests.stacks.starts.asking import arguments, ask_spawned


def run_own_scheduler_process(*ranks: Any, **display: Any) -> None:
    """Run SGLang's scheduler, whose arguments differ between versions, but for its plugins."""
    from sglang.srt.managers import scheduler

    vars(scheduler)["load_plugins"] = lambda: None
    scheduler.run_scheduler_process(*ranks, **display)


def serve(words: list[str]) -> None:
    from sglang.srt.entrypoints.engine import Engine, init_tokenizer_manager
    from sglang.srt.entrypoints.http_server import _setup_and_run_http_server
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process
    from sglang.srt.server_args import prepare_server_args

    server_args = prepare_server_args(words)
    tokenizer_manager, template_manager, port_args, started, watchdog, *_ = (
        Engine._launch_subprocesses(
            server_args=server_args,
            init_tokenizer_manager_func=init_tokenizer_manager,
            run_scheduler_process_func=run_own_scheduler_process,
            run_detokenizer_process_func=run_detokenizer_process,
        )
    )
    _setup_and_run_http_server(
        server_args,
        tokenizer_manager,
        template_manager,
        port_args,
        started.scheduler_infos,
        watchdog,
    )


def main() -> None:
    values, prompt = arguments()
    words = []
    for name, value in values.items():
        words += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    ask_spawned(serve, words, values["port"], prompt)


if __name__ == "__main__":
    main()
