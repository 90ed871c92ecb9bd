"""Drafters that are not models: an n-gram index over the tokens of all requests.

`ngram` keeps the index and `ngram_kernels` its compiled loops; both run in the scheduler process
and know nothing of SGLang. May import `cpu.kernels`; `engine` imports it.
"""
