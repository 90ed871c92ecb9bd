"""Patches that the shapes from v16 on share."""
