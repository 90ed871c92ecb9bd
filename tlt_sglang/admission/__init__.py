"""Admission: which requests the engine accepts, decided before a request is scheduled.

The rules are data (`rules_of_requests`, `rules_of_sampling`): a field, the values that it may have,
and the words for them. Each violation becomes one sentence that names the field, its value and the
allowed range. Everything here is pure: plain data in, BadRequest out. Only the engine imports it.
"""
