"""verl, Trinity: an asynchronous actor starts SGLang's processes and serves its app itself.

It replaces the function that prepares SGLang's environment, as verl does when it is imported, so
that signal handlers stay its own.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os

import sglang.srt.entrypoints.engine as engine_module
import uvicorn
from sglang.srt.entrypoints.http_server import Engine, _GlobalState, app, set_global_state
from sglang.srt.managers.tokenizer_manager import ServerStatus
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils import kill_process_tree

from tests.stacks.starts.asking import arguments, ask


def own_environment(server_args: ServerArgs) -> None:
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "4"
    multiprocessing.set_start_method("spawn", force=True)


vars(engine_module)["_set_envs_and_config"] = own_environment


async def main() -> None:
    values, prompt = arguments()
    os.environ["SGLANG_BLOCK_NONZERO_RANK_CHILDREN"] = "0"
    server_args = ServerArgs(**values)
    tokenizer_manager, template_manager, _, started, *_ = Engine._launch_subprocesses(
        server_args=server_args,
        init_tokenizer_manager_func=engine_module.init_tokenizer_manager,
        run_scheduler_process_func=engine_module.run_scheduler_process,
        run_detokenizer_process_func=engine_module.run_detokenizer_process,
    )
    set_global_state(
        _GlobalState(
            tokenizer_manager=tokenizer_manager,
            template_manager=template_manager,
            scheduler_info=started.scheduler_infos[0],
        )
    )
    app.is_single_tokenizer_mode = True
    app.server_args = server_args
    app.warmup_thread_kwargs = {"server_args": server_args}
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=values["port"], log_level="warning")
    )
    serving = asyncio.create_task(server.serve())
    tokenizer_manager.server_status = ServerStatus.Up
    url = f"http://127.0.0.1:{values['port']}"
    await asyncio.to_thread(ask, url, prompt, lambda: not serving.done())
    kill_process_tree(os.getpid(), include_parent=False)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
