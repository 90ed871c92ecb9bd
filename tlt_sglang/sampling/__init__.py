"""The rule at temperature > 0: drafts are proposed and verified so that output stays the target's.

Runs in the engine; imports torch, and SGLang inside functions.
"""
