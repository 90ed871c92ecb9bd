"""The part of ``sgl_kernel.speculative`` that SGLang uses on CPU (n-gram drafts)."""

from tlt_sglang.cpu.later import kernel

reconstruct_indices_from_tree_mask = kernel("reconstruct_indices_from_tree_mask")

__all__ = ["reconstruct_indices_from_tree_mask"]
