"""Decisions about speculation: which strategy decodes the next step, and why.

Everything here is pure: no torch, no clock, no I/O, no SGLang, so that a recorded run replays to
the same choices. `strategies` defines the notation, `policy` the interface, `cost_model` the
default policy. May import `config` and `errors`; `graphs`, `engine` and the command line import it.
"""
