"""The one settings surface: every setting written once, and what it means as SGLang's arguments.

`settings` is the table; flags, the check of files and the settings page are generated from it.
Nothing else in the package reads flags or the environment for settings. Imports `models`,
`strategy` and the CPU target's sizes, never a running engine.
"""
