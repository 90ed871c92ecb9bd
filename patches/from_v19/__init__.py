"""Patches that the shapes from v19 on share."""
