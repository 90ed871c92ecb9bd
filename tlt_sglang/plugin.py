"""The entry point of the `sglang.srt.plugins` group: check the patches and apply them.

SGLang calls `load` early in its main, scheduler and detokenizer processes; `tlt_sglang_startup`
calls it earlier where it is installed. SGLang swallows exceptions of plugins and would continue
without TLT, so a problem ends the process with one sentence. With TLT off (no `TLT_CONFIG`) nothing
is imported and nothing is changed.

With several tokenizer workers, `app` is what each of them serves: SGLang does not load plugins
there.
"""

from __future__ import annotations

import os
import traceback
from typing import TYPE_CHECKING

from tlt_sglang.errors import TltError, end_process

if TYPE_CHECKING:
    from fastapi import FastAPI


def load() -> None:
    """Apply every patch to this process, if TLT is on. Idempotent."""
    if not os.environ.get("TLT_CONFIG", "").strip():
        return
    try:
        _load()
    except TltError as error:
        end_process(error)
    except ImportError as error:
        traceback.print_exc()
        end_process(f"TLT_CONFIG is set, but TLT cannot be imported ({error}); run tlt check.")
    except Exception as error:
        traceback.print_exc()
        end_process(f"Loading TLT failed with {error!r}; please report this.")


def _load() -> None:
    from tlt_sglang.config import sources
    from tlt_sglang.engine import engine
    from tlt_sglang.patches import patches_for
    from tlt_sglang.patching.patcher import Patcher
    from tlt_sglang.upstream import versions

    config = sources.from_environment()
    if config is None or engine.current is not None:
        return
    device = sources.engine_device()
    patcher = Patcher(patches_for(versions.installed()), device)
    patcher.apply()
    patcher.verify()
    engine.start(engine.Engine(config, device, patcher))


def __getattr__(name: str) -> FastAPI:
    """Return SGLang's app with the patches in force and our routes, as `app`."""
    if name != "app":
        raise AttributeError(name)
    load()
    from sglang.srt.entrypoints import http_server

    from tlt_sglang.engine import calibration
    from tlt_sglang.startup import http_app

    http_app.prepare()
    calibration.skip()
    app: FastAPI = http_server.app
    return app
