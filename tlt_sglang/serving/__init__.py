"""Serving: what the HTTP process sends to a client, where SGLang's own answer lacks a part.

It works on the answers alone and starts nothing. Patches may import it.
"""
