"""sglang.srt.server_args, in the main process: our strategy as SGLang's arguments.

The arguments of this shape are resolved when they are constructed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream

_MODULE = "sglang.srt.server_args"


@wraps_upstream(
    f"{_MODULE}:ServerArgs.__post_init__",
    why="SGLang's own fields must describe the strategy before it resolves them",
    remove_when="SGLang lets plugins contribute defaults to ServerArgs",
    process="main",
)
def post_init(original: Upstream, args: Any) -> None:
    from tlt_sglang.errors import ConfigError
    from tlt_sglang.startup import arguments

    if args.tokenizer_worker_num > 1:
        raise ConfigError(
            f"--tokenizer-worker-num {args.tokenizer_worker_num} is not available with this "
            "SGLang, whose workers would serve requests without TLT; leave it out."
        )
    arguments.before_resolution(args)
    original(args)


@wraps_upstream(
    f"{_MODULE}:ServerArgs.reserve_for_graph_mb",
    why="the default size of the KV cache leaves no room for the graphs of several strategies",
    remove_when="SGLang reserves memory for what plugins say they need",
    process="main",
    only_on="cuda",
)
def reserve_for_graph_mb(original: Upstream, args: Any) -> float:
    from tlt_sglang.config.cuda_memory import reserved_bytes
    from tlt_sglang.engine import engine

    reserved: float = original(args)
    return reserved + reserved_bytes(engine.require().config, args) / 2**20


PATCHES = (post_init, reserve_for_graph_mb)
