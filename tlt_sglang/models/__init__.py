"""Models by name, and what the checkpoints of targets and drafters say about themselves.

An alias becomes a local Hugging Face folder here, and a drafter is checked against its target.
Imports `errors` and the file helpers of `weights`; no engine, no trainer.
"""
