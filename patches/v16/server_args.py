"""sglang.srt.server_args, in the main process: our strategy as SGLang's arguments.

The arguments of this shape are resolved when they are constructed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.server_args:ServerArgs.__post_init__",
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


PATCHES = (post_init,)
