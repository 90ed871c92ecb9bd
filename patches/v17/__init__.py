"""Patches of the shape whose settings are fields and entries of namespaces."""
