"""A whole RL run in AReaL's trainer, with plain decoding and with drafts, to the same weights.

Here live the problems, the policy that is fine-tuned on worked solutions of them, the trainer's
program, and the benchmark that runs it against servers. Nothing else imports from here.
"""
