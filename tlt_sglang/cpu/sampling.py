"""Sampling verification on CPU: temperature, top-k, top-p and min-p, exactly as the target has it.

SGLang's `eagle_sample` draws its coins from the batch's sampling parameters and then calls a kernel
that gets the coins but not the parameters; `remember` carries them from the one call to the other
(the scheduler is single-threaded). Runs in the scheduler process.
"""

from __future__ import annotations

from typing import Any

from tlt_sglang.cpu.kernels import tree_speculative_sampling_target_only

_parameters: Any = None


def remember(sampling_info: Any) -> None:
    """The sampling parameters of the batch that is verified next."""
    global _parameters
    _parameters = sampling_info


def verify(*, draft_probs: Any, **arguments: Any) -> None:
    """Accept drafts and sample the bonus token; the kernel's own docstring has the arguments.

    These drafts are single tokens without a distribution: `draft_probs` is all zeros.
    """
    _verify(draft_probs=None, **arguments)


def verify_drawn(**arguments: Any) -> None:
    """The same for chains that were drawn from `draft_probs`."""
    _verify(drawn=True, **arguments)


def _verify(**arguments: Any) -> None:
    global _parameters
    info, _parameters = _parameters, None
    assert info is not None, "verification without sampling parameters"
    tree_speculative_sampling_target_only(
        top_ks=info.top_ks if info.need_top_k_sampling else None,
        top_ps=info.top_ps if info.need_top_p_sampling else None,
        min_ps=info.min_ps if info.need_min_p_sampling else None,
        **arguments,
    )
