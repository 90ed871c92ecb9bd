"""Versions of a drafter: published by the sidecar, staged, swapped in and guarded by the engine."""
