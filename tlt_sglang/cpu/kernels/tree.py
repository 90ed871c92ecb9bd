"""Draft trees: links, positions and masks of the nodes that one verification covers.

A tree of ``n`` nodes is stored as three ``[batch, n]`` int64 tables: ``retrieve_index``
(row of the node in the flat batch), ``retrieve_next_token`` (its first child) and
``retrieve_next_sibling``, with -1 for none. Node 0 is the root, the last committed token.

Runs in the scheduler process. Knows nothing of SGLang.
"""

import torch

from tlt_sglang.cpu.kernels.compile import Array, flat, indices, inline, kernel, np

FULL_MASK, QLEN_ONLY = 0, 1


@inline()
def _find(selected: Array, base: int, count: int, value: int) -> int:
    for i in range(count):
        if selected[base + i] == value:
            return i
    return -1


@kernel(
    "void(int64[::1], int64, int64[::1], int64, int64[::1], boolean[::1], int64[::1],"
    " int64[::1], int64[::1], int64[::1], int64, int64, int64, boolean)"
)
def _build(
    parents: Array,
    parents_width: int,
    selected: Array,
    selected_width: int,
    seq_lens: Array,
    mask: Array,
    positions: Array,
    row_of: Array,
    child_of: Array,
    sibling_of: Array,
    topk: int,
    depth: int,
    n: int,
    with_prefix: bool,
) -> None:
    mask_start = 0
    for b in range(seq_lens.size):
        prefix = seq_lens[b] if with_prefix else 0
        base, chosen, above = b * n, b * selected_width, b * parents_width
        positions[base] = seq_lens[b]
        row_of[base] = base
        # Links. Nodes are added backwards, each in front of its siblings, so that lists ascend.
        for i in range(n - 1, 0, -1):
            row_of[base + i] = base + i
            group = selected[chosen + i - 1] // topk
            parent = 0
            if group > 0:
                parent = _find(selected, chosen, n - 1, parents[above + group]) + 1
                if parent == 0:
                    continue
            if child_of[base + parent] != -1:
                sibling_of[base + i] = child_of[base + parent]
            child_of[base + parent] = i
        # The mask of ancestors, and the position from their number.
        for i in range(n):
            row = mask_start + i * (prefix + n) + prefix
            mask[row] = True
            for j in range(1, n):
                mask[row + j] = False
            node, height = i - 1, 0
            while node >= 0 and height < depth:
                height += 1
                mask[row + node + 1] = True
                group = selected[chosen + node] // topk
                if group == 0:
                    break
                node = _find(selected, chosen, n - 1, parents[above + group])
            positions[base + i] = seq_lens[b] + height
        mask_start += n * (prefix + n)


@kernel(
    "void(boolean[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64, int64)"
)
def _reconstruct(
    mask: Array,
    seq_lens: Array,
    positions: Array,
    row_of: Array,
    child_of: Array,
    sibling_of: Array,
    batch: int,
    n: int,
) -> None:
    parent = np.empty(n, np.int64)
    for b in range(batch):
        base, cells = b * n, b * n * n
        # The parent is the last ancestor before the node.
        for i in range(n):
            height, parent[i] = 0, -1
            for j in range(i):
                if mask[cells + i * n + j]:
                    height += 1
                    parent[i] = j
            row_of[base + i] = base + i
            positions[base + i] = seq_lens[b] + height
            child_of[base + i] = -1
            sibling_of[base + i] = -1
        # The first child is the first descendant, a sibling the next node of the same parent.
        for i in range(n):
            for k in range(i + 1, n):
                if mask[cells + k * n + i]:
                    child_of[base + i] = k
                    break
            if parent[i] < 0:
                continue
            for k in range(i + 1, n):
                if parent[k] == parent[i]:
                    sibling_of[base + i] = k
                    break


def _tables(
    positions: torch.Tensor, row_of: torch.Tensor, child_of: torch.Tensor, sibling_of: torch.Tensor
) -> tuple[Array, Array, Array, Array]:
    return (
        flat(positions, torch.int64, "positions"),
        flat(row_of, torch.int64, "retrive_index"),
        flat(child_of, torch.int64, "retrive_next_token"),
        flat(sibling_of, torch.int64, "retrive_next_sibling"),
    )


def build_tree_kernel_efficient_cpu(
    parent_list: torch.Tensor,
    selected_index: torch.Tensor,
    verified_seq_len: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,
) -> None:
    """Link the nodes EAGLE selected into trees; fill their positions and their mask, in place.

    Args:
        parent_list: ``[batch, 1 + (depth - 2) * topk]``, candidate that each group of ``topk``
            candidates descends from; its width may be 0 for trees of one level.
        selected_index: ``[batch, draft_token_num - 1]``, selected candidates, ascending.
        verified_seq_len: ``[batch]``, committed length of each request.
        tree_mask: flat bool; ``[batch, n, n]`` for QLEN_ONLY, and for FULL_MASK each request's
            ``[n, seq_len + n]`` in turn (only the last n columns of a row are written).
        positions: flat ``[batch * n]`` int64, written.
        retrive_index: ``[batch, n]`` int64, written, as are the next two, which come in as -1.
        retrive_next_token: first children.
        retrive_next_sibling: next siblings.
        topk: branching of the draft.
        depth: number of draft steps.
        draft_token_num: ``n``.
        tree_mask_mode: 0 for FULL_MASK, 1 for QLEN_ONLY.

    Raises:
        NotImplementedError: ``tree_mask_mode`` is the bit-packed mask.
        ValueError: ``tree_mask`` is too small.
    """
    if tree_mask_mode not in (FULL_MASK, QLEN_ONLY):
        raise NotImplementedError(
            f"tree mask mode {tree_mask_mode} is not available on CPU; use 0 or 1"
        )
    seq_lens = indices(verified_seq_len)
    batch, n = seq_lens.size, draft_token_num
    with_prefix = tree_mask_mode == FULL_MASK
    mask = flat(tree_mask, torch.bool, "tree_mask")
    cells = batch * n * n + (int(seq_lens.sum()) * n if with_prefix else 0)
    tables = _tables(positions, retrive_index, retrive_next_token, retrive_next_sibling)
    if mask.size < cells or min(table.size for table in tables) < batch * n:
        raise ValueError(f"outputs are too small for {batch} trees of {n} nodes")
    _build(
        indices(parent_list),
        parent_list.shape[-1],
        indices(selected_index),
        selected_index.shape[-1],
        seq_lens,
        mask,
        *tables,
        topk,
        depth,
        n,
        with_prefix,
    )


def reconstruct_indices_from_tree_mask(
    tree_mask: torch.Tensor,
    verified_seq_len: torch.Tensor,
    positions: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Recover links and positions from ``[batch, n, n]`` ancestor masks, in place.

    ``tree_mask[b, i, j]`` is true if node j is node i or an ancestor of it; ancestors come before
    their descendants.
    """
    mask = flat(tree_mask, torch.bool, "tree_mask")
    tables = _tables(positions, retrive_index, retrive_next_token, retrive_next_sibling)
    nodes = batch_size * draft_token_num
    if mask.size < nodes * draft_token_num or min(table.size for table in tables) < nodes:
        raise ValueError(f"tensors are too small for {batch_size} trees of {draft_token_num} nodes")
    _reconstruct(mask, indices(verified_seq_len), *tables, batch_size, draft_token_num)
