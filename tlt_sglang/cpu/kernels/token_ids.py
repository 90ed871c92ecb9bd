"""Token ids around a draft step: bonus tokens and shifted inputs.

Runs in the scheduler process. Knows nothing of SGLang.
"""

import numpy as np
import torch

from tlt_sglang.cpu.kernels.compile import Array, check, flat, indices, kernel


@kernel("int64(int64[::1], int64[::1], int32[::1], int64)")
def _last_accepted(tokens: Array, lengths: Array, bonus: Array, width: int) -> int:
    for b in range(lengths.size):
        at = b * width + lengths[b] - 1
        if lengths[b] < 1 or lengths[b] > width or at >= tokens.size or b >= bonus.size:
            return b
        bonus[b] = tokens[at]
    return -1


@kernel("int64(int64[::1], int64[::1], int64[::1], int64[::1], int64[::1])")
def _rotate(ids: Array, start: Array, lengths: Array, new: Array, last: Array) -> int:
    for b in range(lengths.size):
        first, length = start[b], lengths[b]
        if length <= 0:
            continue
        at = last[b] if last.size > 0 else first + length - 1
        if first < 0 or first + length > ids.size or at < 0 or at >= ids.size or b >= new.size:
            return b
        for i in range(first, first + length - 1):
            ids[i] = ids[i + 1]
        ids[at] = new[b]
    return -1


def fill_bonus_tokens_cpu(
    accept_tokens: torch.Tensor,
    accept_lens: torch.Tensor,
    bonus_tokens: torch.Tensor,
    accept_stride: int,
) -> None:
    """Write each request's last accepted token, ``accept_tokens[b, accept_lens[b] - 1]``.

    Args:
        accept_tokens: ``[batch, accept_stride]``, accepted tokens first.
        accept_lens: ``[batch]``, at least 1: the bonus token counts.
        bonus_tokens: ``[batch]`` int32, written.
        accept_stride: width of ``accept_tokens``.
    """
    bad = _last_accepted(
        indices(accept_tokens),
        indices(accept_lens),
        flat(bonus_tokens, torch.int32, "bonus_tokens"),
        accept_stride,
    )
    check(bad, "its accept length exceeds accept_tokens")


_NO_ROWS = np.empty(0, np.int64)


def rotate_input_ids_cpu(
    input_ids: torch.Tensor,
    extend_start_loc: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    topk_index: torch.Tensor,
    select_index: torch.Tensor | None = None,
) -> None:
    """Shift each request's ids one to the left, in place, and put its new token at the end.

    ``select_index[b]``, unless None, is the row of ``input_ids`` that takes the new token instead
    of the request's last row.
    """
    bad = _rotate(
        flat(input_ids, torch.int64, "input_ids"),
        indices(extend_start_loc),
        indices(extend_seq_lens),
        indices(topk_index),
        _NO_ROWS if select_index is None else indices(select_index),
    )
    check(bad, "its tokens exceed input_ids")
