"""Small programs that start SGLang with the calls, and in the order, of an RL stack.

Each takes SGLang's arguments and a prompt as JSON, generates, and prints an object with the token
ids and what our status routes report. The test runs them as programs.
"""
