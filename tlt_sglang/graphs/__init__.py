"""CUDA graphs of a pool of strategies: which to capture, and how to switch between them.

`plan`, `sizes` and `model_plan` decide under a memory budget and are pure; `states` holds SGLang's
runtime states in the scheduler process. May import `strategy`, `config`, `models`, `upstream` and
`errors`; `engine` and the command line import it.
"""
