"""sglang.srt.speculative.eagle_utils, in the scheduler process: the kernels of sampling on CPU.

SGLang names them at the top of the module, where they are None.
"""

from __future__ import annotations

from collections.abc import Callable

from tlt_sglang.cpu import later
from tlt_sglang.patching.patch import Patch, replaces_upstream


def _replaced(name: str, value: Callable[..., object], why: str) -> Patch:
    return replaces_upstream(
        f"sglang.srt.speculative.eagle_utils:{name}",
        value,
        why=why,
        remove_when="SGLang's CPU verification applies temperature, top-k, top-p and min-p",
        process="scheduler",
        only_on="cpu",
    )


_FILTERED_LATER = "the sampling kernel applies all filters at once"

PATCHES = (
    _replaced("top_k_renorm_prob", later.unfiltered, _FILTERED_LATER),
    _replaced("top_p_renorm_prob", later.unfiltered, _FILTERED_LATER),
    _replaced(
        "tree_speculative_sampling_target_only",
        later.verify,
        "upstream's kernel is None on CPU",
    ),
)
