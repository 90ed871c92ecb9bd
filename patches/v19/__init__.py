"""Patches of the shape whose settings are a dataclass that a call of its own resolves."""
