"""Hidden states on their way from an engine to training: one log in shared memory per engine.

The engine writes through `tap` and `writer`; other processes read through `reader` and `assemble`,
and get `sequence.TokenSequence`. May be imported by engine, sidecar and training, and imports none
of them; only `tap` needs torch.
"""
