"""Views of a run for people: the event log read back, a report page, and a live view of a server.

Runs in commands of `tlt` (and `scalars` in the sidecar), never in an engine, and changes nothing.
May import `config`, `coordinator` and `errors`; the command line and `sidecar` import it.
"""
