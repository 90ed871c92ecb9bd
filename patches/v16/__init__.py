"""Patches of the shape whose settings are fields of ServerArgs, and whose drafts have no seeds."""
