"""Entry point of the `sglang.srt.plugins` group: check, apply, or stop this process.

SGLang calls `load` early in its main, scheduler and detokenizer processes. It swallows exceptions
of plugins and would go on without us, so a problem leaves as SystemExit, with one sentence.
With TLT off (no `TLT_CONFIG`) nothing is imported and nothing is touched.
"""

from __future__ import annotations

import traceback

from tlt_sglang.config import sources
from tlt_sglang.errors import TltError, end_process


def load() -> None:
    """Put every patch in force in this process, if TLT is on."""
    try:
        config = sources.from_environment()
        if config is None:
            return
        from tlt_sglang.engine import engine
        from tlt_sglang.patches import all_patches
        from tlt_sglang.patching.patcher import Patcher

        if engine.current is not None:
            return
        device = sources.engine_device()
        patcher = Patcher(all_patches(), device)
        patcher.apply()
        patcher.verify()
        engine.start(engine.Engine(config, device, patcher))
    except TltError as error:
        end_process(error)
    except Exception as error:
        traceback.print_exc()
        end_process(f"loading failed, please report it: {error!r}")
