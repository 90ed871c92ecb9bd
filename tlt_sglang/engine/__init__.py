"""One engine process: what happens around and inside a decode step of SGLang's scheduler.

`engine` joins the parts, `step` is the hot path, `online_drafter` harvests and hot-swaps, `admin`
answers `/tlt/...`. May import every room but `training`, `sidecar` and `launcher`; only `patches`
calls it.
"""
