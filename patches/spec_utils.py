"""sglang.srt.speculative.spec_utils, in the scheduler process: drafting without a compiler."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream

_MODULE = "sglang.srt.speculative.spec_utils"


@wraps_upstream(
    f"{_MODULE}:_select_top_k_tokens_later",
    why="torch.compile takes five seconds at the first draft, and a few tiny tensors gain nothing",
    remove_when="SGLang does not compile it for CPUs",
    process="scheduler",
    only_on="cpu",
)
def select_top_k_tokens_later(original: Upstream, *args: object, **kwargs: object) -> object:
    eager: Upstream = inspect.unwrap(original)
    return eager(*args, **kwargs)


PATCHES = (select_top_k_tokens_later,)
