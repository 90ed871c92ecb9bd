"""The process beside an engine that trains its drafter on harvested hidden states: `tlt sidecar`.

`service` is the command, `process` and `session` run it; `feed` reads harvest logs, `buffer` keeps
sequences, `online` trains and gates, `publisher` publishes. Imports training, harvest and weights,
never SGLang; the engine never imports it.
"""
