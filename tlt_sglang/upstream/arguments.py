"""SGLang's arguments before and after their resolution, and on their way to other processes.

SGLang keeps a record of what the operator asked for and notes its own decisions beside it, so a
record that was resolved without us can be resolved again. Runs in the process that starts SGLang,
and wherever its arguments arrive.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

_MARK = "_tlt"
"""An attribute beside SGLang's fields, which alone are read-only once they are resolved."""


class Mark:
    """Says that arguments have our fields. A process that receives them loads TLT.

    SGLang and stacks start processes with these arguments, and not all of them load plugins there.
    """

    def __reduce__(self) -> tuple[Callable[[], Mark], tuple[()]]:
        return _arrive, ()


def _arrive() -> Mark:
    # By name, because the plugin imports every other room.
    importlib.import_module("tlt_sglang.plugin").load()
    return Mark()


def mark(args: Any) -> None:
    """Note that `args`, a `ServerArgs`, has our fields."""
    setattr(args, _MARK, Mark())


def is_marked(args: Any) -> bool:
    """Return True if `args` has our fields."""
    return hasattr(args, _MARK)


def resolve_again(
    args: Any, fields: Sequence[str], assign: Callable[[Any, str, object], None]
) -> bool:
    """Resolve `args` once more from what the operator asked for; return whether that is possible.

    `assign` sets one of the `fields`, which are read-only once they are resolved.

    It is not where SGLang has published the record to its processes. Errors are those of
    `resolve_once`; `args` keeps its first resolution then.
    """
    from sglang.srt.runtime_context import get_context

    try:
        published = get_context().server_args
    except ValueError:
        published = None
    if published is args:
        return False
    fresh = type(args)(**{name: getattr(args, name) for name in fields})
    fresh.resolve_once()
    for name in fields:
        assign(args, name, getattr(fresh, name))
    vars(args).update(vars(fresh))
    return True
