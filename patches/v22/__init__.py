"""Patches of the shape in which SGLang looks for the kernels of sampling in `sgl_kernel`."""
