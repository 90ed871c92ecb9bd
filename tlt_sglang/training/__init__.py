"""Training a drafter offline: `tlt data`, `tlt train`, `tlt seed`; the sidecar uses its parts.

Data, batches, draft models in plain PyTorch, losses, the training loop, evaluation and export.
Never imports SGLang, and the engine never imports it.
"""
