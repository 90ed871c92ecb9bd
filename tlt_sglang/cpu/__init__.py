"""Speculative decoding on CPUs without AMX: attention, decoder layers, drafting, sampling, kernels.

Everything that SGLang has for GPUs only, or slowly, on CPU. Patches call it in the scheduler
process; `kernels` knows nothing of SGLang, the modules beside it adapt its objects. Imports
`errors` and `upstream` alone.
"""
