"""A stand-in for ``sgl_kernel`` where its compiled library is missing (SGLang on CPU).

SGLang imports it by name in every engine process, before plugins load; put the folder above
this one on ``sys.path`` (``PYTHONPATH``) for that. It holds what speculative decoding needs and
no model kernels: ``torch.ops.sgl_kernel.convert_weight_packed`` stays undefined, so SGLang
keeps off its AMX paths.
"""

import sys
from typing import NoReturn

from sgl_kernel import speculative
from tlt_sglang.cpu.later import kernel, register_murmur_hash, unfiltered, verify

assign_draft_cache_locs_contiguous_cpu = kernel("assign_draft_cache_locs_contiguous_cpu")
assign_extend_cache_locs_cpu = kernel("assign_extend_cache_locs_cpu")
assign_req_to_token_pool_cpu = kernel("assign_req_to_token_pool_cpu")
build_tree_kernel_efficient_cpu = kernel("build_tree_kernel_efficient_cpu")
copy_all_layer_kv_cache_cpu = kernel("copy_all_layer_kv_cache_cpu")
fill_accept_out_cache_loc_cpu = kernel("fill_accept_out_cache_loc_cpu")
fill_bonus_tokens_cpu = kernel("fill_bonus_tokens_cpu")
rotate_input_ids_cpu = kernel("rotate_input_ids_cpu")
verify_tree_greedy_cpu = kernel("verify_tree_greedy_cpu")
top_k_renorm_prob = top_p_renorm_prob = unfiltered
tree_speculative_sampling_target_only = verify
register_murmur_hash()


def __getattr__(name: str) -> NoReturn:
    message = (
        f"sgl_kernel.{name} is not in TLT's CPU stand-in for sgl_kernel, which holds the kernels"
        " of speculative decoding only; this model or flag needs the compiled sgl_kernel"
    )
    caller = sys._getframe(1).f_globals.get("__name__")
    if caller == "importlib._bootstrap" and not name.startswith("__"):
        # `from sgl_kernel import name` would drop the message of an AttributeError.
        raise ImportError(message, name=__name__, path=__file__)
    raise AttributeError(message, name=name)


__all__ = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "speculative",
    "top_k_renorm_prob",
    "top_p_renorm_prob",
    "tree_speculative_sampling_target_only",
    "verify_tree_greedy_cpu",
]
