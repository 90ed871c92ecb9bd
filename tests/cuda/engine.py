"""SGLang's scheduler with its workers and graph runners on the simulated device, in this process.

Left out are only SGLang's other processes (HTTP server, tokenizer, detokenizer): requests come as
token ids, and answers are read from the scheduler's own requests. An `Engine` must be made before
anything of SGLang is imported, which looks for a GPU then.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.cuda import graphs, kernels, older
from tests.support.fitting import Tiny, make_tiny
from tests.support.tiny import greedily

MOST_REQUESTS = 4
FLAGS = [
    *("--device", "cuda", "--dtype", "float32", "--skip-tokenizer-init", "--random-seed", "1"),
    *("--attention-backend", "triton", "--sampling-backend", "pytorch"),
    *("--max-total-tokens", "4096", "--max-running-requests", str(MOST_REQUESTS)),
    *("--cuda-graph-max-bs-decode", str(MOST_REQUESTS), "--chunked-prefill-size", "64"),
    *("--disable-prefill-cuda-graph", "--log-level", "warning"),
]


class Engine:
    """A scheduler on tiny models with a drafter that is often right, and prompts for it."""

    def __init__(self, folder: Path, **settings: object) -> None:
        """Start with these settings of TLT, or plain SGLang without any."""
        torch.set_num_threads(1)
        self.models = make_tiny(folder)
        flags = ["--model-path", self.models.path]
        os.environ["TLT_CONFIG"] = json.dumps(settings) if settings else ""
        if settings:
            flags += ["--speculative-draft-model-path", self.models.drafters["eagle3"]]
        lengths = (3, 17, 40, 90)
        self.prompts = [torch.randint(3, Tiny.vocab, (length,)).tolist() for length in lengths]
        graphs.install()
        kernels.install()
        self.scheduler = _scheduler([*FLAGS, *flags])

    def expected(self, length: int) -> list[list[int]]:
        """Return what transformers generates greedily, on the host."""
        with graphs.busy():
            prompts = [torch.tensor([prompt]) for prompt in self.prompts]
            return [greedily(self.models.model, prompt, length)[0] for prompt in prompts]

    def generate(self, length: int, **sampling: float) -> list[list[int]]:
        """Return what the scheduler's own loop generates after all prompts at once.

        Greedily, or with parameters of `SamplingParams`; the seed of a request is its number.
        """
        requests = [
            self._submit(prompt, length, {**sampling, "sampling_seed": seed} if sampling else {})
            for seed, prompt in enumerate(self.prompts)
        ]

        def ingest(stop_at_pause: bool = False) -> list[Any]:
            if self.scheduler.last_batch is None and all(one.finished() for one in requests):
                raise _Done
            return []

        if hasattr(self.scheduler, "ingest_requests"):
            self.scheduler.ingest_requests = ingest
        else:
            self.scheduler.request_receiver = SimpleNamespace(recv_requests=ingest)
        with contextlib.suppress(_Done):
            self.scheduler.run_event_loop()
        return [list(request.output_ids) for request in requests]

    def _submit(self, prompt: Sequence[int], length: int, sampling: Mapping[str, Any]) -> Any:
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        params = SamplingParams(
            max_new_tokens=length, ignore_eos=True, **({"temperature": 0} | dict(sampling))
        )
        params.normalize(None)
        fields = dict.fromkeys(
            ("input_embeds", "mm_inputs", "token_type_ids", "token_ids_logprob"), None
        )
        request = TokenizedGenerateReqInput(
            rid=str(len(prompt)),
            input_text="",
            input_ids=array.array("q", prompt),
            sampling_params=params,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            stream=False,
            **fields,
        )
        self.scheduler.handle_generate_request(request)
        return self.scheduler.waiting_queue[-1]


class _Done(Exception):
    """Ends the scheduler's endless loop."""


def _scheduler(flags: Sequence[str]) -> Any:
    """Start a scheduler as `run_scheduler_process` does."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt import runtime_context
    from sglang.srt.server_args import PortArgs, prepare_server_args

    arguments = prepare_server_args(list(flags))
    ports = PortArgs.init_new(arguments)
    atexit.register(_remove_loads, ports.instance_id)
    if not hasattr(runtime_context, "publish"):
        return older.scheduler(arguments, ports)
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.runtime_context import SpawnRanks, publish

    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    return Scheduler(arguments, ports)


def _remove_loads(instance: str) -> None:
    """Remove what SGLang's main process removes: the shared memory in which a scheduler reports."""
    for path in Path("/dev/shm").glob(f"sglang_loads_{instance}_*"):
        path.unlink()
