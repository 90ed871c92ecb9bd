"""Plain versions of the kernels, one for each, slow and easy to verify by eye.

The tests compare the kernels in `tlt_sglang.cpu.kernels` with them. Signatures and results are
those of the kernels; outputs are written in place.
"""

import ctypes
from itertools import pairwise

import torch

MASK32 = 0xFFFFFFFF


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write each request's packed slots into its row of the table."""
    lengths = (end_offset - start_offset).clamp(min=0).tolist()
    parts = torch.split(out_cache_loc[: sum(lengths)], lengths)
    for req, start, part in zip(req_pool_indices, start_offset, parts, strict=True):
        req_to_token[req, start : start + len(part)] = part.to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Pack the slots between the offsets of all requests."""
    requests = zip(req_pool_indices, start_offset, end_offset, strict=True)
    slots = torch.cat([req_to_token[req, start:end] for req, start, end in requests])
    out_cache_loc[: len(slots)] = slots


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
    topk: int,
    speculative_num_steps: int,
) -> None:
    """Pack the slots of all draft steps of all requests."""
    end = seq_lens + topk * speculative_num_steps
    assign_extend_cache_locs_cpu(
        req_pool_indices, req_to_token, seq_lens, end, out_cache_loc, pool_len
    )


def fill_accept_out_cache_loc_cpu(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor
) -> None:
    """Pack the slots of the accepted tokens."""
    kept = out_cache_loc[accept_index[accept_index >= 0].long()]
    accept_out_cache_loc[: len(kept)] = kept


def fill_bonus_tokens_cpu(
    accept_tokens: torch.Tensor,
    accept_lens: torch.Tensor,
    bonus_tokens: torch.Tensor,
    accept_stride: int,
) -> None:
    """Write each request's last accepted token."""
    last = accept_lens.long().unsqueeze(1) - 1
    bonus_tokens[:] = accept_tokens.reshape(-1, accept_stride).gather(1, last).squeeze(1)


def rotate_input_ids_cpu(
    input_ids: torch.Tensor,
    extend_start_loc: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    topk_index: torch.Tensor,
    select_index: torch.Tensor | None = None,
) -> None:
    """Shift each request's ids one to the left and append its new token."""
    for b, token in enumerate(topk_index.flatten().tolist()):
        start, length = int(extend_start_loc[b]), int(extend_seq_lens[b])
        if length == 0:
            continue
        input_ids[start : start + length - 1] = input_ids[start + 1 : start + length].clone()
        last = start + length - 1 if select_index is None else int(select_index[b])
        input_ids[last] = token


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Copy rows in each buffer as if all at once."""
    for address, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(address + row * stride, stride) for row in src_loc.tolist()]
        for row, content in zip(tgt_loc.tolist(), rows, strict=True):
            ctypes.memmove(address + row * stride, content, stride)


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
    """Link the selected nodes and fill their positions and mask."""
    n, cursor = draft_token_num, 0
    for b, seq_len in enumerate(verified_seq_len.tolist()):
        candidates = selected_index[b].tolist()
        parents = [-1]
        for candidate in candidates:
            group = candidate // topk
            parent = 0 if group == 0 else candidates.index(int(parent_list[b, group])) + 1
            parents.append(parent)
        prefix = seq_len if tree_mask_mode == 0 else 0
        mask = tree_mask[cursor : cursor + n * (prefix + n)].view(n, prefix + n)[:, prefix:]
        cursor += n * (prefix + n)
        mask.zero_()
        for node in range(n):
            retrive_index[b, node] = b * n + node
            ancestor, height = node, 0
            while ancestor > 0:
                mask[node, ancestor] = True
                ancestor, height = parents[ancestor], height + 1
            mask[node, 0] = True
            positions[b * n + node] = seq_len + height
            children = [i for i in range(n) if parents[i] == node]
            if children:
                retrive_next_token[b, node] = children[0]
            for left, right in pairwise(children):
                retrive_next_sibling[b, left] = right


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
    """Recover links and positions from ancestor masks."""
    n = draft_token_num
    masks = tree_mask.view(batch_size, n, n)
    retrive_next_token.fill_(-1)
    retrive_next_sibling.fill_(-1)
    for b in range(batch_size):
        above = [[j for j in range(i) if masks[b, i, j]] for i in range(n)]
        parents = [max(nodes, default=-1) for nodes in above]
        for i in range(n):
            retrive_index[b, i] = b * n + i
            positions[b * n + i] = int(verified_seq_len[b]) + len(above[i])
            below = [k for k in range(n) if i in above[k]]
            if below:
                retrive_next_token[b, i] = below[0]
            later = [k for k in range(i + 1, n) if parents[k] == parents[i] >= 0]
            if later:
                retrive_next_sibling[b, i] = later[0]


def murmur_hash32_cpu(
    seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor
) -> torch.Tensor:
    """Hash every pair of a row's (seed, position) and a column."""

    def hash_one(seed: int, position: int, column: int) -> int:
        state = 0
        for block in (seed, seed >> 32, position, column):
            k = (block & MASK32) * 0xCC9E2D51 & MASK32
            k = (k << 15 | k >> 17) & MASK32
            state ^= k * 0x1B873593 & MASK32
            state = (state << 13 | state >> 19) & MASK32
            state = (state * 5 + 0xE6546B64) & MASK32
        state ^= 16
        state = (state ^ state >> 16) * 0x85EBCA6B & MASK32
        state = (state ^ state >> 13) * 0xC2B2AE35 & MASK32
        return state ^ state >> 16

    columns = col_indices.tolist()
    return torch.tensor(
        [
            [hash_one(s, p, c) for c in columns]
            for s, p in zip(seed.tolist(), positions.tolist(), strict=True)
        ],
        dtype=torch.uint32,
    )


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
    """Accept the path of drafts that equal the target's choice."""
    for b in range(candidates.shape[0]):
        path, node = [0], 0
        while len(path) < accept_index.shape[1]:
            target = int(target_predict[b, path[-1]])
            node = int(retrive_next_token[b, path[-1]])
            while node != -1 and int(candidates[b, node]) != target:
                node = int(retrive_next_sibling[b, node])
            if node == -1:
                break
            path.append(node)
        accept_token_num[b] = len(path) - 1
        for depth, node in enumerate(path):
            accept_index[b, depth] = retrive_index[b, node]
            predicts[retrive_index[b, node]] = target_predict[b, node].to(predicts.dtype)


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
    draft_probs: torch.Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """Accept drafts by the target's probabilities and sample the next token."""
    target, coins = target_probs.double(), uniform_samples.double()
    for b in range(candidates.shape[0]):
        path = [0]
        while True:
            node, tried, accepted = path[-1], 0.0, -1
            residual = target[b, node].clone()
            if len(path) == accept_index.shape[1]:
                break
            residual = (residual - draft_probs[b, node].double()).clamp(min=0)
            child = int(retrive_next_token[b, node])
            tokens: set[int] = set()
            while child != -1 and accepted == -1:
                token = int(candidates[b, child])
                mass = 0.0 if token in tokens else float(target[b, node, token])
                tokens.add(token)
                tried += mass
                under = float(coins[b, node]) < tried / threshold_acc
                if mass > 0 and (under or mass >= threshold_single):
                    accepted = child
                else:
                    residual[token] = 0
                    child = int(retrive_next_sibling[b, child])
            if accepted == -1:
                break
            path.append(accepted)
        cumulative = residual.cumsum(0)
        goal = float(uniform_samples_for_final_sampling[b]) * float(cumulative[-1])
        final = int((cumulative > goal).int().argmax())
        accept_token_num[b] = len(path) - 1
        for depth, node in enumerate(path):
            row = int(retrive_index[b, node])
            accept_index[b, depth] = row
            last = depth == len(path) - 1
            predicts[row] = final if last else int(candidates[b, path[depth + 1]])


def truncate_probs(
    probs: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    need_top_k: bool,
    need_top_p: bool,
    need_min_p: bool,
) -> torch.Tensor:
    """Truncate as the plain sampler does: one stable sort, all limits on the untruncated row."""
    ordered, tokens = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if need_top_k:
        drop |= torch.arange(probs.shape[-1]) >= top_ks.view(-1, 1)
    if need_top_p:
        drop |= (before > top_ps.view(-1, 1)) & (top_ps.view(-1, 1) < 1)
    if need_min_p:
        drop |= ordered < (ordered[:, 0] * min_ps).view(-1, 1)
    kept = ordered.masked_fill(drop, 0)
    kept = kept / kept.double().sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, tokens, kept.float())


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: list[list[int]],
    scale: float,
) -> torch.Tensor:
    """Attend with query t over the KV slots `slots[t]`: q [T, H, D], keys and values [S, K, D]."""
    group = q.shape[1] // keys.shape[1]
    out = torch.empty_like(q)
    for t, visible in enumerate(slots):
        for head in range(q.shape[1]):
            k, v = keys[visible, head // group].double(), values[visible, head // group].double()
            weights = torch.softmax(k @ q[t, head].double() * scale, dim=0)
            out[t, head] = (weights @ v).float()
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / rms(x) * weight over the last dimension."""
    x = x.double()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.double()).float()


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Return silu of the first half of the last dimension times its second half."""
    gate, up = x.double().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).float()


def rope(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, H, D] with paired halves; table [P, rotary] has cosines, then sines."""
    half = table.shape[1] // 2
    cos, sin = (part.double()[:, None] for part in table[positions].chunk(2, dim=-1))
    a, b, rest = torch.split(x.double(), [half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).float()


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the noise [T, D] as SGLang's `multinomial_with_seed` computes it."""
    hashed = murmur_hash32_cpu(seeds.to(torch.uint64), positions, tokens)
    x = hashed.to(torch.float64) / torch.iinfo(torch.uint32).max
    x = x.log().clamp(min=torch.finfo(torch.float64).min, max=-(2.0**-32)).neg()
    return -x.log()
