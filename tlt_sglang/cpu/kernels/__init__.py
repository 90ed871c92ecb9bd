"""CPU kernels of speculative decoding: what SGLang has as CUDA or Triton kernels elsewhere.

Thin functions over torch tensors, with numba behind them; `tests/support/reference_kernels.py` has
the plain version of each, which the tests compare with. Importing compiles or loads the kernels and
touches nothing of SGLang.
"""

from tlt_sglang.cpu.kernels.cache_locs import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    fill_accept_out_cache_loc_cpu,
)
from tlt_sglang.cpu.kernels.hashing import murmur_hash32_cpu
from tlt_sglang.cpu.kernels.kv_move import copy_all_layer_kv_cache_cpu
from tlt_sglang.cpu.kernels.token_ids import fill_bonus_tokens_cpu, rotate_input_ids_cpu
from tlt_sglang.cpu.kernels.tree import (
    build_tree_kernel_efficient_cpu,
    reconstruct_indices_from_tree_mask,
)
from tlt_sglang.cpu.kernels.truncate import (
    min_p_renorm_prob,
    top_k_renorm_prob,
    top_p_renorm_prob,
    truncate_probs,
)
from tlt_sglang.cpu.kernels.verify import (
    tree_speculative_sampling_target_only,
    verify_tree_greedy_cpu,
)

__all__ = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "min_p_renorm_prob",
    "murmur_hash32_cpu",
    "reconstruct_indices_from_tree_mask",
    "rotate_input_ids_cpu",
    "top_k_renorm_prob",
    "top_p_renorm_prob",
    "tree_speculative_sampling_target_only",
    "truncate_probs",
    "verify_tree_greedy_cpu",
]
