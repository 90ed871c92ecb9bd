"""RLinf: an Engine of its own, with subclasses of SGLang's Scheduler and TokenizerManager.

They take the place of SGLang's classes in their modules before SGLang loads plugins; in the
scheduler's process that happens in a function of its own, which then calls SGLang's.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

import sglang.srt.entrypoints.engine as engine_module
import sglang.srt.managers.scheduler as scheduler_module
import sglang.srt.managers.tokenizer_manager as tokenizer_module
from sglang.srt.server_args import ServerArgs

from tests.stacks.starts.asking import arguments, parameters, report


class OwnTokenizerManager(tokenizer_module.TokenizerManager):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own = True


class OwnScheduler(scheduler_module.Scheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own_release = 0

    def get_internal_state(self, recv_req: Any) -> Any:
        state = super().get_internal_state(recv_req)
        state.internal_state["own_scheduler"] = type(self).__name__
        return state


def own_environment(server_args: ServerArgs) -> None:
    multiprocessing.set_start_method("spawn", force=True)


def run_own_scheduler(*args: Any, **kwargs: Any) -> None:
    vars(scheduler_module)["Scheduler"] = OwnScheduler
    scheduler_module.run_scheduler_process(*args, **kwargs)


class OwnEngine(engine_module.Engine):
    run_scheduler_process_func = staticmethod(run_own_scheduler)


def main() -> None:
    values, prompt = arguments()
    del values["port"]
    vars(engine_module)["_set_envs_and_config"] = own_environment
    vars(engine_module)["TokenizerManager"] = OwnTokenizerManager
    vars(tokenizer_module)["TokenizerManager"] = OwnTokenizerManager
    engine = OwnEngine(**values)
    try:
        assert engine.tokenizer_manager.own
        answer = engine.generate(input_ids=prompt, sampling_params=parameters())
        state = engine.get_server_info()["internal_states"][0]
        assert state["own_scheduler"] == "OwnScheduler"
        report(answer["output_ids"], {"schedulers": [state["tlt"]] if "tlt" in state else []})
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
