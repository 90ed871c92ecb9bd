"""Patches that the shapes from v22 on share."""
