"""The coordinator decides which trainer may use which device, and when.

Engines report their load, trainers receive commands to start and stop, and RL stacks announce
rollouts and claim devices. `messages` is the protocol, `states` and `world` hold the pure
decisions, `server` and `client` are the two ends. Imports `config` and `errors`; never torch,
SGLang or numpy.
"""
