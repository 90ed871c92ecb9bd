"""sglang.srt.managers.scheduler_components.output_streamer, in the scheduler: meta_info.

SGLang carries the `customized_info` of a request into its `meta_info`, one value for each token
unless the key is declared to be of the whole request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.managers.scheduler_components.output_streamer:"
    "SchedulerOutputStreamer.is_request_level_customized_info_key",
    why="the drafter versions of a request are reported once, not for each token",
    remove_when="SGLang lets plugins add to a request's meta_info",
    process="scheduler",
)
def is_request_level_customized_info_key(original: Upstream, streamer: object, key: str) -> bool:
    from tlt_sglang.engine.online_drafter import VERSION_KEY

    return key == VERSION_KEY or bool(original(streamer, key))


PATCHES = (is_request_level_customized_info_key,)
