"""Stands in for a logger that AReaL imports and the tests do not use."""
