"""Versions of a drafter, from publication by the sidecar to hot swap and guard in the engine.

`store` keeps them, `manifest` describes them, `swap` and `guard` are the engine's side. May be
imported by engine, sidecar and training; imports none of them.
"""
