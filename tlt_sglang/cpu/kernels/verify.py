"""Verification of a draft tree: the nodes to accept, and the token after the last of them.

Both kernels walk down from the root. Greedy verification follows the target's argmax. Sampling
accepts a child with exactly the target's probability of its token, so the emitted tokens are
distributed as the target's own samples for any draft (Leviathan et al. 2023, with a deterministic
draft). Trees are described in `tree`.

Runs in the scheduler process. Knows nothing of SGLang.
"""

import torch

from tlt_sglang.cpu.kernels.compile import Array, flat, indices, inline, kernel, np
from tlt_sglang.cpu.kernels.truncate import limits, truncate_row

_BLOCK = 256


@kernel(
    "void(int32[::1], int32[::1], int32[::1], int64[::1], int64[::1], int64[::1],"
    " int64[::1], int64[::1], int64, int64, int64)"
)
def _greedy(
    predicts: Array,
    accept_index: Array,
    accept_token_num: Array,
    candidates: Array,
    row_of: Array,
    child_of: Array,
    sibling_of: Array,
    target: Array,
    batch: int,
    n: int,
    width: int,
) -> None:
    for b in range(batch):
        base = b * n
        row = row_of[base]
        accept_index[b * width] = row
        accepted, node = 0, 0
        while accepted + 1 < width:
            node = child_of[base + node]
            while node != -1 and candidates[base + node] != target[row]:
                node = sibling_of[base + node]
            if node == -1:
                break
            predicts[row] = target[row]
            row = row_of[base + node]
            accepted += 1
            accept_index[b * width + accepted] = row
        accept_token_num[b] = accepted
        predicts[row] = target[row]


@inline(fastmath={"reassoc"})
def _sum(weights: Array) -> float:
    total = 0.0
    for i in range(weights.size):
        total += np.float64(weights[i])
    return total


@inline()
def _sample_index(weights: Array, coin: float) -> int:
    """Return an index with probability proportional to its weight, or -1 if none is positive."""
    # Sums of blocks, so that the search below adds few numbers.
    total, last = 0.0, -1
    sums = np.empty((weights.size + _BLOCK - 1) // _BLOCK, np.float64)
    for block in range(sums.size):
        sums[block] = _sum(weights[block * _BLOCK : (block + 1) * _BLOCK])
        total += sums[block]
        if sums[block] > 0:
            last = block
    if last < 0:
        return -1
    # The block, and then the index, at which the cumulated weight exceeds the coin's share.
    goal, mass, block = coin * total, 0.0, 0
    while block < last and not mass + sums[block] > goal:
        mass += sums[block]
        block += 1
    chosen = -1
    for i in range(block * _BLOCK, min((block + 1) * _BLOCK, weights.size)):
        if weights[i] > 0:
            chosen = i
            mass += weights[i]
            if mass > goal:
                break
    return chosen


@kernel(
    "void(int32[::1], int32[::1], int32[::1], int64[:, ::1], int64[::1], int64[::1], int64[::1],"
    " float32[:, ::1], float32[::1], float32[:, :, ::1], float32[:, :, ::1], float64,"
    " float64, int64[::1], float32[::1], float32[::1])"
)
def _sample(
    predicts: Array,
    accept_index: Array,
    accept_token_num: Array,
    candidates: Array,
    row_of: Array,
    child_of: Array,
    sibling_of: Array,
    coins: Array,
    final_coins: Array,
    target: Array,
    draft: Array,
    threshold_single: float,
    threshold_acc: float,
    top_k: Array,
    top_p: Array,
    min_p: Array,
) -> None:
    batch, n, vocab = target.shape
    width = accept_index.size // batch if batch > 0 else 0
    rejected = np.empty(n, np.int64)
    weights = np.empty(vocab, np.float32)
    for b in range(batch):
        # Walk down from the root, as long as a child is accepted.
        base = b * n
        row = row_of[base]
        accept_index[b * width] = row
        accepted, node, rejections, nearest = 0, 0, 0, -1
        truncate_row(target[b, node], top_k[b], top_p[b], min_p[b])
        while accepted + 1 < width:
            child, tried = child_of[base + node], 0.0
            rejections, nearest = 0, -1
            while child != -1:
                token = candidates[b, child]
                mass = 0.0
                # A rejected token has no mass any more; one outside the vocabulary never had any.
                if 0 <= token < vocab and token not in rejected[:rejections]:
                    mass = np.float64(target[b, node, token])
                tried += mass
                if mass > 0:
                    if coins[b, node] < tried / threshold_acc or mass >= threshold_single:
                        break
                    nearest = token
                    rejected[rejections] = token
                    rejections += 1
                child = sibling_of[base + child]
            if child == -1:
                break
            predicts[row] = candidates[b, child]
            row, node = row_of[base + child], child
            accepted += 1
            accept_index[b * width + accepted] = row
            rejections, nearest = 0, -1
            truncate_row(target[b, node], top_k[b], top_p[b], min_p[b])
        accept_token_num[b] = accepted

        # The next token, from the target without the mass of the rejected drafts.
        weights[:] = target[b, node]
        if draft.size > 0 and accepted + 1 < width:
            for token in range(vocab):
                weights[token] = max(weights[token] - draft[b, node, token], np.float32(0))
        for i in range(rejections):
            weights[rejected[i]] = 0
        token = _sample_index(weights, np.float64(final_coins[b]))
        if token < 0:
            # The children hold all the mass, and rounding put the coin behind the last one.
            token = nearest if nearest >= 0 else np.argmax(target[b, node])
        predicts[row] = token


def verify_tree_greedy_cpu(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:
    """Accept the path of draft tokens that equal the target's choice at their parent.

    Args:
        predicts: flat ``[batch * n]`` int32, written at the accepted nodes: the token after it.
        accept_index: ``[batch, width]`` int32, written: rows of the accepted nodes, root first;
            the entries behind them are unchanged (-1).
        accept_token_num: ``[batch]`` int32, written: accepted draft tokens.
        candidates: ``[batch, n]`` token ids of the nodes.
        retrive_index: ``[batch, n]``, row of each node.
        retrive_next_token: ``[batch, n]``, first children.
        retrive_next_sibling: ``[batch, n]``, next siblings.
        target_predict: ``[batch, n]``, the target's token after each node.
    """
    batch, n = candidates.shape
    _greedy(
        flat(predicts, torch.int32, "predicts"),
        flat(accept_index, torch.int32, "accept_index"),
        flat(accept_token_num, torch.int32, "accept_token_num"),
        indices(candidates),
        indices(retrive_index),
        indices(retrive_next_token),
        indices(retrive_next_sibling),
        indices(target_predict),
        batch,
        n,
        accept_index.shape[1],
    )


def tree_speculative_sampling_target_only(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    uniform_samples: torch.Tensor,
    uniform_samples_for_final_sampling: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor | None,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
    *,
    top_ks: torch.Tensor | None = None,
    top_ps: torch.Tensor | None = None,
    min_ps: torch.Tensor | None = None,
) -> None:
    """Accept draft tokens by the target's probabilities; exact with both thresholds at 1.

    The children of a node share one coin: one is accepted when the coin is below the mass of
    the children tried so far. Where none is, the next token comes from the target with their
    tokens taken out. A token of probability zero is never emitted.

    Args:
        predicts: as in `verify_tree_greedy_cpu`.
        accept_index: as in `verify_tree_greedy_cpu`.
        accept_token_num: as in `verify_tree_greedy_cpu`.
        candidates: as in `verify_tree_greedy_cpu`.
        retrive_index: as in `verify_tree_greedy_cpu`.
        retrive_next_token: as in `verify_tree_greedy_cpu`.
        retrive_next_sibling: as in `verify_tree_greedy_cpu`.
        uniform_samples: ``[batch, n]`` in [0, 1): the coin for the children of each node.
        uniform_samples_for_final_sampling: ``[batch]`` in [0, 1).
        target_probs: ``[batch, n, vocab]``, the target's distribution after each node.
        draft_probs: subtracted from the target's where no child was accepted, as upstream
            does; None is the same as zeros and saves filling and reading it. Unlike
            upstream's kernel this one does not write into it.
        threshold_single: accept any child with at least this probability; below 1 is lossy.
        threshold_acc: divides the mass the coin is compared with; below 1 is lossy.
        deterministic: has no effect; the kernel is always deterministic.
        top_ks: ``[batch]``, not in upstream's kernel: truncate as `truncate_probs` does, but only
            the few rows that are visited, in place where ``target_probs`` is contiguous float32.
        top_ps: ``[batch]``, like ``top_ks``.
        min_ps: ``[batch]``, like ``top_ks``.
    """
    batch, n = candidates.shape
    _sample(
        flat(predicts, torch.int32, "predicts"),
        flat(accept_index, torch.int32, "accept_index"),
        flat(accept_token_num, torch.int32, "accept_token_num"),
        indices(candidates).reshape(batch, n),
        indices(retrive_index),
        indices(retrive_next_token),
        indices(retrive_next_sibling),
        uniform_samples.to(torch.float32).contiguous().numpy(),
        uniform_samples_for_final_sampling.to(torch.float32).contiguous().numpy(),
        target_probs.to(torch.float32).contiguous().numpy(),
        _NO_DRAFT if draft_probs is None else draft_probs.to(torch.float32).contiguous().numpy(),
        threshold_single,
        max(threshold_acc, 1e-9),
        *limits(batch, top_ks, top_ps, min_ps),
    )


_NO_DRAFT = np.empty((0, 0, 0), np.float32)
