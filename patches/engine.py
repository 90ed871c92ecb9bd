"""sglang.srt.entrypoints.engine, in the main process: processes from the fork server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import ServerArgs, Upstream


@wraps_upstream(
    "sglang.srt.entrypoints.engine:_set_envs_and_config",
    why="it sets the start method to spawn, with which every process imports everything again",
    remove_when="SGLang's CPU engine can start its processes by forkserver",
    process="main",
    only_on="cpu",
)
def set_envs_and_config(original: Upstream, server_args: ServerArgs) -> None:
    from tlt_sglang.cpu import ranks
    from tlt_sglang.launcher import prefork

    original(server_args)
    ranks.share_cores(server_args.tp_size)
    prefork.use()


PATCHES = (set_envs_and_config,)
