"""The one settings surface: fields, flags, TOML, and what they mean as SGLang's own arguments.

Nothing else in the package reads flags or the environment for settings. Imports `models`,
`strategy` and the CPU target's sizes, never a running engine.
"""
