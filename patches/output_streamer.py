"""sglang.srt.managers.scheduler_components.output_streamer, in the scheduler: meta_info.

SGLang carries what a request's `customized_info` holds into its `meta_info`, a value for each token
unless the key is said to be of the request.
"""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching.patch import wraps_upstream


@wraps_upstream(
    "sglang.srt.managers.scheduler_components.output_streamer:"
    "SchedulerOutputStreamer.is_request_level_customized_info_key",
    why="the versions that drafted for a request are told once, not for each token",
    remove_when="SGLang lets plugins add to a request's meta_info",
    process="scheduler",
    digests={"0.5.23": "4fda0c46b08c19cf"},
)
def is_request_level_customized_info_key(original: Any, streamer: Any, key: str) -> Any:
    from tlt_sglang.engine.online_drafter import VERSION_KEY

    return key == VERSION_KEY or original(streamer, key)


PATCHES = (is_request_level_customized_info_key,)
