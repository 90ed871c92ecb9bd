"""Patches of the shape in which outputs of the target have no field for last hidden states.

SGLang looks for kernels of sampling in `sgl_kernel` there.
"""
