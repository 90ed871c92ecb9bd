"""sglang.srt.speculative.spec_utils, in the scheduler process: no compiler in the first draft."""

from __future__ import annotations

import inspect
from typing import Any

from tlt_sglang.patching import wraps_upstream


@wraps_upstream(
    "sglang.srt.speculative.spec_utils:_select_top_k_tokens_later",
    why="torch.compile takes five seconds at the first draft, and a few tiny tensors gain nothing",
    remove_when="SGLang does not compile it for CPUs",
    process="scheduler",
    only_on="cpu",
    digests={"0.5.23": "95fc7b236799ba7a"},
)
def select_top_k_tokens_later(original: Any, *args: Any, **kwargs: Any) -> Any:
    return inspect.unwrap(original)(*args, **kwargs)


PATCHES = (select_top_k_tokens_later,)
