"""The hidden states that a request asks for: the target's last, as plain decoding returns them.

Under EAGLE-3, SGLang returns what the drafter reads instead, three layers side by side; and its
n-gram worker returns the nodes of a tree in the order of the tree.

Runs in the scheduler process. Shapes: B requests, W rows per request, T tokens of prompts, N hidden
size, F features a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tlt_sglang import upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.layers import LogitsProcessor
    from tlt_sglang.upstream.protocols import LogitsOutput, StepResult, VerifyInput


def are_returned() -> bool:
    """Return whether this engine lets requests ask for hidden states."""
    return upstream.current().returns_hidden_states()


def last_are_kept() -> bool:
    """Return whether the target's last hidden states are needed beside the features."""
    from tlt_sglang.engine import engine

    return engine.require().config.harvests or are_returned()


def append_last(
    features: torch.Tensor, last: torch.Tensor, processor: LogitsProcessor
) -> torch.Tensor:
    """Return features [T, F] of a target with its last hidden states [T, N] behind them, if its
    logits processor is to keep these, and SGLang's outputs have no field for them."""
    kept = getattr(processor, "keep_last_hidden_states", False)
    return torch.cat([features, last], dim=-1) if kept else features


def take_off_last(output: LogitsOutput, hidden_size: int) -> None:
    """Undo `append_last` in the output of a forward pass, before the drafter reads it."""
    stored = output.hidden_states
    if stored is None or stored.shape[-1] <= hidden_size or not last_are_kept():
        return
    output.hidden_states = stored[:, :-hidden_size].contiguous()
    output.last_hidden_states = stored[:, -hidden_size:].contiguous()


def put_last(result: StepResult) -> None:
    """Replace the features of a finished step of EAGLE, [B * W, F] or [T, F], by last hidden states
    [B * W, N] or [T, N], where the drafter reads others. The drafter has read them by now."""
    sglang, output = upstream.current(), result.logits_output
    last, accept_index = sglang.last_hidden_states(output), sglang.accept_index(result)
    if last is None:
        return
    if accept_index is not None:
        # SGLang has moved the accepted rows to the front, but not those of this tensor.
        last = accepted_first(last, accept_index, result.speculative_num_draft_tokens)
    output.hidden_states = last


def order_ngrams(
    verify_input: VerifyInput, output: LogitsOutput, accept_index: torch.Tensor
) -> None:
    """Move the hidden states of the accepted n-grams, at `accept_index` [B, depth], to the front of
    each request's rows; SGLang does so for its other trees."""
    if verify_input.tree_topk < 0 and output.hidden_states is not None and len(accept_index):
        width = verify_input.draft_token_num
        output.hidden_states = accepted_first(output.hidden_states, accept_index, width)


def accepted_first(rows: torch.Tensor, accept_index: torch.Tensor, width: int) -> torch.Tensor:
    """Return the rows [B * W, ...] of a verify step with each request's accepted ones first; their
    indices are `accept_index` [B, depth], and `width` is W."""
    moved, depth = rows.clone(), accept_index.shape[1]
    by_request = moved.view(-1, width, *rows.shape[1:])
    by_request[:, :depth] = rows[accept_index.clamp(min=0).long()]
    return moved
