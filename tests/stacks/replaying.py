"""Replay the calls of an RL stack, as a file of `traces` has them, against one of our servers.

A trace is the sequence of requests that a stack sends, read in its source. Values that begin with
"$" stand for what a run fills in: token ids, the folder of the model, serialized tensors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from tests.support.servers import Server
from tests.support.trainer import Trainer, trainer

TRACES = Path(__file__).parent / "traces"
CHANGED = "model.norm.weight"
"""The tensor that every update changes: one of the target's own, whatever the drafter."""

SESSION = "/begin_weight_update"

NEED_A_GPU = ("/release_memory_occupation", "/resume_memory_occupation")
"""The calls of colocated training, which an engine on CPU refuses."""


def names(sessions: bool) -> list[str]:
    """Return the stacks that have a trace; those that open `sessions` of updates only if asked."""
    traces = {path.stem: path.read_text(encoding="utf-8") for path in TRACES.glob("*.json")}
    return sorted(name for name, text in traces.items() if sessions or SESSION not in text)


class Replay:
    """A stack that talks to a server, with the weights that its trainer would have."""

    def __init__(
        self, server: Server, model: str, weight: torch.Tensor, ids: Sequence[int]
    ) -> None:
        self._server = server
        self._original, self._factor = weight, 1.0
        self._values: dict[str, object] = {"$ids": list(ids), "$model": model}
        self._exit = ExitStack()
        self._trainer: Trainer | None = None
        self.generated = 0

    def play(self, stack: str) -> None:
        """Send every call of the trace and check its answer, in order."""
        trace = json.loads((TRACES / f"{stack}.json").read_text(encoding="utf-8"))
        with self._exit:
            for step in trace["calls"]:
                self._step(step)

    def _step(self, step: dict[str, Any]) -> None:
        if step.get("group") == "join":
            self._trainer = self._exit.enter_context(trainer(self._server))
            return
        if step.get("group") == "leave":
            self._exit.close()
            return
        kind = step.get("weights")
        if kind is not None:
            self._prepare(kind)
        answer = self._send(step, kind)
        for name, value in step.get("answer", {}).items():
            assert answer[name] == value, (step, answer)
        if step["call"] == "POST /generate":
            self._check(step["send"], answer)
        if kind is not None:
            self._check_weight()

    def _prepare(self, kind: str) -> None:
        """Make the weights of the next update; a checkpoint has the original ones."""
        self._factor = 1.0 if kind == "disk" else self._factor + 0.25
        self._weight = self._original * self._factor
        named = [(CHANGED, self._weight.clone())]
        if kind == "tensors":
            self._values["$tensors"] = [_serialized(named)]
        elif kind == "bucket":
            from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

            bucket = FlattenedTensorBucket(named_tensors=named)
            flat = {
                "flattened_tensor": bucket.get_flattened_tensor(),
                "metadata": bucket.get_metadata(),
            }
            self._values["$bucket"] = [_serialized(flat)]

    def _send(self, step: dict[str, Any], kind: str | None) -> Any:
        method, path = step["call"].split()
        body = {name: self._filled(value) for name, value in step.get("send", {}).items()}
        if kind == "broadcast":
            assert self._trainer is not None
            return self._trainer.send({CHANGED: self._weight}, **body)
        if path in NEED_A_GPU:
            answer = self._server.request(method, path, json=body)
            assert (answer.status_code, "needs a GPU" in answer.text) == (400, True), answer.text
            return {}
        if method == "GET":
            return self._server.get(path)
        return self._server.post(path, body)

    def _filled(self, value: Any) -> Any:
        return self._values[value] if isinstance(value, str) and value[:1] == "$" else value

    def _check(self, send: dict[str, Any], answer: dict[str, Any]) -> None:
        """Check that every generated token has its logprob, and that drafts are counted."""
        meta = answer["meta_info"]
        count = send["sampling_params"]["max_new_tokens"]
        assert meta["finish_reason"]["type"] == "length"
        assert len(answer["output_ids"]) == meta["completion_tokens"] == count
        rows = meta["output_token_logprobs"]
        assert [row[1] for row in rows] == answer["output_ids"]
        assert all(row[0] <= 0 for row in rows)
        start = send.get("logprob_start_len")
        if start is not None:
            ids = self._values["$ids"]
            assert isinstance(ids, list)
            scored = meta["input_token_logprobs"]
            assert [row[1] for row in scored] == ids[start:]
        self.generated += 1

    def _check_weight(self) -> None:
        """Check that the target has the weights of the last update."""
        body = {"name": CHANGED, "truncate_size": 8}
        loaded = torch.tensor(self._server.post("/get_weights_by_name", body))
        torch.testing.assert_close(loaded.flatten()[:8], self._weight[:8], atol=1e-5, rtol=1e-5)


def _serialized(value: object) -> str:
    from sglang.srt.utils import MultiprocessingSerializer

    text: str = MultiprocessingSerializer.serialize(value, output_str=True)
    return text
