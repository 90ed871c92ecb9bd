"""Models by name, and checks of the checkpoints of targets and drafters.

An alias is resolved to a local Hugging Face folder here, and a drafter is checked against its
target. Imports `errors`, `config` and `strategy`; no engine, no trainer.
"""
