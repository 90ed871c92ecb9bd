"""Views of a run for people: the event log read back or sent again, a report page, a live view.

Runs in commands of `tlt` (and `scalars` in the sidecar), never in an engine, and changes nothing.
May import `config`, `coordinator` and `errors`; the command line and `sidecar` import it.
"""
