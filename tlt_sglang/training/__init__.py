"""Offline training of a drafter: `tlt data`, `tlt train`, `tlt seed`; the sidecar uses its parts.

Holds data, batches, draft models in plain PyTorch, losses, the training step and loop, evaluation
and export. Imports harvest (for `TokenSequence`) and weights, never SGLang; the engine never
imports it.
"""
