"""AReaL: SGLang's arguments from a command line, and a scheduler process that loads no plugins."""

from __future__ import annotations

from typing import Any

from tests.stacks.starts.asking import arguments, ask_spawned


def run_own_scheduler_process(
    server_args: Any,
    port_args: Any,
    gpu_id: int,
    tp_rank: int,
    pp_rank: int,
    dp_rank: int | None,
    pipe_writer: Any,
    **display: Any,
) -> None:
    from sglang.srt.managers.scheduler import (
        Scheduler,
        SpawnRanks,
        configure_scheduler_process,
        publish,
        spawn_world_rank,
    )

    rank = spawn_world_rank(server_args, tp_rank=tp_rank, pp_rank=pp_rank)
    ranks = SpawnRanks(world_rank=rank, dp_rank=dp_rank, gpu_id=gpu_id)
    publish(server_args, role="scheduler", ranks=ranks)
    configure_scheduler_process(server_args, gpu_id)
    scheduler = Scheduler(server_args, port_args)
    pipe_writer.send(scheduler.get_init_info())
    scheduler.run_event_loop()


def serve(words: list[str]) -> None:
    from sglang.srt.entrypoints.engine import Engine, init_tokenizer_manager
    from sglang.srt.entrypoints.http_server import _setup_and_run_http_server
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process
    from sglang.srt.server_args import prepare_server_args

    server_args = prepare_server_args(words)
    tokenizer_manager, template_manager, port_args, started, watchdog, _ = (
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
