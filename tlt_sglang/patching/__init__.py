"""Patches as data, digests of the upstream source they fit, and the one door to SGLang.

`patch` describes a patch, `source` digests upstream without importing it, `patcher` applies and
reverts. Imports `errors` alone; everything else that SGLang needs changed goes through here.
"""
