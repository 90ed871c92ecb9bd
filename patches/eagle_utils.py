"""sglang.srt.speculative.eagle_utils, in the scheduler process: sampling on CPU.

Upstream commits the argmax on CPU at any temperature, because its sampling kernels exist for GPUs
only. These patches take the same branch as on a GPU, with our kernels, and apply min-p, which
upstream's verification ignores. They make penalties exact, which upstream relaxes, and skip most of
upstream's work for greedy batches.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.layers import GrammarMask, PenalisedBatch
    from tlt_sglang.upstream.protocols import LogitsOutput, SamplingInfo, Upstream, VerifyInput

_MODULE = "sglang.srt.speculative.eagle_utils"


@wraps_upstream(
    f"{_MODULE}:eagle_sample",
    why="the target chooses by the noise that the drafter knows; penalties, which upstream "
    "relaxes, are exact, and custom logit processors, which it ignores, are called",
    remove_when="SGLang verifies by the noise of a seed, penalises a draft for every token before "
    "it, and calls custom logit processors under speculation",
    process="scheduler",
)
def eagle_sample(
    original: Upstream,
    verify_input: VerifyInput,
    batch: PenalisedBatch,
    logits_output: LogitsOutput,
    grammar_mask: object = None,
    *args: object,
    **kwargs: object,
) -> object:
    from tlt_sglang import upstream
    from tlt_sglang.engine import engine

    on_cpu = engine.require().device == "cpu"
    mask = upstream.current().grammar_mask(verify_input, grammar_mask)
    if not batch.forward_mode.is_idle() and _change_logits(
        verify_input, batch, logits_output, mask, on_cpu
    ):
        mask = grammar_mask = None
    if on_cpu and _is_merely_greedy(batch, grammar_mask, *args, **kwargs):
        from tlt_sglang.cpu import sampling

        outcome = sampling.verify_greedy(verify_input, logits_output.next_token_logits)
    elif _is_coupled(batch, **kwargs):
        outcome = _verify_coupled(verify_input, batch, logits_output, mask, on_cpu)
    else:
        with _sampling(batch.sampling_info, on_cpu):
            outcome = original(verify_input, batch, logits_output, grammar_mask, *args, **kwargs)
    slots = engine.require().step.slots
    outcome = slots.accept(outcome, batch.seq_lens, verify_input.draft_token_num)
    if batch.return_hidden_states:
        from tlt_sglang.engine import hidden_states

        hidden_states.order_ngrams(verify_input, logits_output, outcome[2])
    return outcome


def _sampling(info: SamplingInfo, on_cpu: bool) -> contextlib.AbstractContextManager[object]:
    """Return the context in which upstream verifies by sampling, if it does."""
    if not on_cpu or info.is_all_greedy:
        return contextlib.nullcontext()
    from tlt_sglang.cpu import branch, sampling

    sampling.remember(info)
    return branch.IS_CPU.sampling()


def _is_merely_greedy(
    batch: PenalisedBatch,
    grammar_mask: object = None,
    *args: object,
    watermark_state: object = None,
    **kwargs: object,
) -> bool:
    """Return whether upstream would only take each row's largest logit."""
    from sglang.srt.environ import envs
    from sglang.srt.speculative.spec_utils import SIMULATE_ACC_LEN

    info = batch.sampling_info
    return (
        not batch.forward_mode.is_idle()
        and info.is_all_greedy
        and grammar_mask is None
        and info.logit_bias is None
        and info.acc_additive_penalties is None
        and info.acc_scaling_penalties is None
        and (watermark_state is None or not info.has_watermark_candidates)
        and not envs.SGLANG_SANITIZE_NAN_LOGITS.get()
        and SIMULATE_ACC_LEN <= 0
    )


def _is_coupled(batch: PenalisedBatch, *, watermark_state: object = None, **_: object) -> bool:
    """Return whether the target chooses by the noise that the drafter knows."""
    from tlt_sglang.engine import engine

    info = batch.sampling_info
    return (
        engine.require().coupled is not None
        and not batch.forward_mode.is_idle()
        and not info.is_all_greedy
        and (watermark_state is None or not info.has_watermark_candidates)
    )


def _verify_coupled(
    verify_input: VerifyInput,
    batch: PenalisedBatch,
    logits_output: LogitsOutput,
    grammar_mask: GrammarMask | None,
    on_cpu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from tlt_sglang.cpu import head, sampling
    from tlt_sglang.sampling import coupled, logits

    rows, info = logits_output.next_token_logits, batch.sampling_info
    if on_cpu:
        head.invalidate()
    else:
        logits.apply_penalties(rows, verify_input.draft_token_num, info)
    logits.apply_mask_and_bias(rows, verify_input.draft_token_num, info, grammar_mask)
    tokens = coupled.sample(rows, info, verify_input.positions)
    return sampling.walk(verify_input, tokens) if on_cpu else coupled.walk(verify_input, tokens)


def _change_logits(
    verify_input: VerifyInput,
    batch: PenalisedBatch,
    logits_output: LogitsOutput,
    grammar_mask: GrammarMask | None,
    on_cpu: bool,
) -> bool:
    """Apply what upstream's verification relaxes or ignores; return whether the mask is applied."""
    info = batch.sampling_info
    processed, penalised = info.has_custom_logit_processor, info.acc_additive_penalties is not None
    if not (processed or penalised):
        return False
    from tlt_sglang.engine import engine
    from tlt_sglang.sampling import logits

    rows = logits.processed_rows(info)
    if penalised and not on_cpu:
        rows |= logits.penalised_rows(batch.reqs)
    logits.cut_drafts(verify_input, rows)
    engine.require().step.cut = rows
    if on_cpu:
        from tlt_sglang.cpu import head

        head.invalidate()
        if penalised:
            _penalise(verify_input, batch, logits_output)
    if not processed:
        return False
    width = verify_input.draft_token_num
    logits.apply_all(logits_output.next_token_logits, width, info, grammar_mask)
    return True


def _penalise(
    verify_input: VerifyInput, batch: PenalisedBatch, logits_output: LogitsOutput
) -> None:
    from tlt_sglang.cpu import penalties

    info, shape = batch.sampling_info, (len(batch.reqs), verify_input.draft_token_num)
    penalties.apply(
        logits_output.next_token_logits,
        batch.reqs,
        verify_input.draft_token.view(shape),
        verify_input.retrieve_next_token.view(shape),
        verify_input.retrieve_next_sibling.view(shape),
    )
    # The penalties are a copy for one forward; upstream must not apply them again.
    info.acc_additive_penalties = info.acc_scaling_penalties = None


PATCHES = (eagle_sample,)
