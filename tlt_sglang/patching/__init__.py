"""Patches as data, digests of the upstream source that they fit, and the one door to SGLang.

`patch` describes a patch, `source` digests upstream without importing it, `patcher` applies and
reverts. Every change of SGLang goes through here. Imports `errors` alone.
"""
