"""Our routes, statuses and warm-up in SGLang's HTTP app, whoever serves it.

SGLang serves its app itself, and so do stacks that run their own uvicorn (verl, Trinity). All of
them start SGLang's processes and set the app's global state first; both lead here. Runs in the main
process, and in each tokenizer worker.
"""

from __future__ import annotations

import sys


def prepare() -> None:
    """Prepare SGLang's app, unless that is done or nothing has imported it. Call it before the app
    is served."""
    http_server = sys.modules.get("sglang.srt.entrypoints.http_server")
    app = getattr(http_server, "app", None)
    if http_server is None or app is None:
        return
    from tlt_sglang.engine import admin, calibration
    from tlt_sglang.serving import http_errors

    if admin.has_routes(app):
        return
    calibration.register()
    http_errors.install(app)
    admin.add_routes(app, http_server.get_global_state)
