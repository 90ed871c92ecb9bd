"""Our strategy in SGLang's arguments, before they are resolved or afterwards.

Runs in the process that starts SGLang. A stack may resolve its arguments before it loads plugins;
then they are resolved again before anything has been started with them.
"""

from __future__ import annotations

import logging
from typing import Any

from tlt_sglang import upstream
from tlt_sglang.config.sglang_arguments import check_resolved, native_fields
from tlt_sglang.engine import engine
from tlt_sglang.upstream import arguments

logger = logging.getLogger(__name__)


def before_resolution(args: Any) -> None:
    """Set the fields of `args` that describe the strategy. Raises ConfigError."""
    current = engine.require()
    current.settle(args)
    for name, value in native_fields(current.config, args, current.device).items():
        setattr(args, name, value)
    upstream.current().mark(args)


def before_processes(args: Any) -> None:
    """Make sure that resolved arguments have the strategy; the next step starts processes.

    Raises PatchError if another plugin has undone a patch, and ConfigError for arguments that lack
    the strategy and cannot be resolved again.
    """
    from sglang.srt.arg_groups.overrides import resolved_view

    current = engine.require()
    current.patcher.verify()
    if not arguments.is_marked(args) and upstream.current().resolve_again(args):
        logger.info("TLT resolved SGLang's arguments again: it was loaded after their resolution.")
    check_resolved(current.config, resolved_view(args), current.device)
