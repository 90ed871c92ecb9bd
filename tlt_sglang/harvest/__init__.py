"""What the target computed, on its way to training: a log in shared memory, one an engine.

Imports numpy and nothing of torch or SGLang: the engine writes, other processes read.
"""
