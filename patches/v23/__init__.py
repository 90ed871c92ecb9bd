"""Patches of the newest shape that others do not share."""
