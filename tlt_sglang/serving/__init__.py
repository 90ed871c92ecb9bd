"""Serving: what the HTTP process answers, where SGLang's own answer lacks a part or breaks off.

It works on the answers alone and starts nothing. The patches and the plugin may import it.
"""
