"""Helpers of the tests: servers, tiny models, drafters fitted to a text, publishers of versions."""
