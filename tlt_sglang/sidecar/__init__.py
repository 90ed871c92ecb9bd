"""The process beside an engine that trains its drafter on what the engine harvests: `tlt sidecar`.

`service` is the process, `feed` reads harvest logs, `buffer` keeps what is trained on, `online`
trains and gates. Never imports SGLang; the engine never imports this.
"""
