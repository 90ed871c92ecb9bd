"""Send requested requests to a live server, and check its answers and its state afterwards."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import requests

from tlt_sglang.launcher.child_process import wait_for
from tlt_sglang.launcher.server_process import ServerProcess
from tools.fuzzing.values import Call, calls

AT_ONCE = 6
BLOCK = 100
"""Requests between two checks of the server's state."""
ANSWER_SECONDS = 90.0
IDLE_SECONDS = 60.0
SHORTEST_SENTENCE = 10
CANARIES = ("The capital of France is", "one two three four f", "def add(a, b):")
"""Prompts whose greedy answers must stay what they were."""
HELD = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")


@dataclass(frozen=True)
class Finding:
    """A request that was not answered as it should be; `number` and `place` draw it again."""

    number: int
    place: int
    method: str
    path: str
    body: Any
    answer: str


@dataclass
class Fuzzing:
    """Requests to one server, its answers, and what was wrong with them."""

    server: ServerProcess
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Answers by route and HTTP status; 0 for none."""
    findings: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._schema = self.server.get("/openapi.json")
        self._canaries = self._greedy()

    def run(
        self, number: int, seconds: float, report: Callable[[str], None] = lambda line: None
    ) -> None:
        """Send the blocks of the seeds `number`, `number` + 1, ... for `seconds`.

        Ends early when the server does. `report` gets a line for each block.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.server.alive:
            self.block(number)
            report(f"seed {number}: {self.answers.total()} requests, {len(self.findings)} findings")
            number += 1

    def block(self, number: int, count: int = BLOCK) -> None:
        """Send the `count` requests of the seed `number`, and check the server's state."""
        requested = calls(self._schema, number, count)
        with ThreadPoolExecutor(AT_ONCE) as threads:
            answers = list(threads.map(self._send, requested))
        unanswered = 0
        for place, (call, (status, text)) in enumerate(zip(requested, answers, strict=True)):
            self.answers[f"{call.method} {call.path}", status] += 1
            unanswered += not status
            if is_right(status, text) or unanswered > AT_ONCE:
                continue  # more than were in flight were not answered because of others
            body = call.body if call.raw is None else call.raw
            finding = Finding(number, place, call.method, call.path, body, f"{status} {text}")
            self.findings.append(finding)
        for problem in self._state():
            self.findings.append(Finding(number, -1, "", "", None, problem))

    def table(self) -> str:
        """Return the number of answers by route and status."""
        statuses = sorted({status for _, status in self.answers})
        rows = [["route", *map(str, statuses)]]
        for route in sorted({route for route, _ in self.answers}):
            rows.append([route, *(str(self.answers[route, status] or "") for status in statuses)])
        return "\n".join(f"{row[0]:40}" + "".join(f"{cell:>8}" for cell in row[1:]) for row in rows)

    def result(self) -> dict[str, Any]:
        """Return counts and findings; JSON-able."""
        answers: dict[str, dict[int, int]] = {}
        for (route, status), count in sorted(self.answers.items()):
            answers.setdefault(route, {})[status] = count
        return {
            "requests": self.answers.total(),
            "answers": answers,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def _send(self, call: Call) -> tuple[int, str]:
        """Return status and text of the answer; status 0 and what happened where there is none."""
        text = call.raw
        if text is None and call.body is not None:
            text = json.dumps(call.body)
        data = None if text is None else text.encode("utf-8", "surrogatepass")
        headers = {"content-type": "application/json"}
        try:
            answer = requests.request(
                call.method,
                self.server.url + call.path,
                data=data,
                headers=headers,
                timeout=ANSWER_SECONDS,
            )
        except requests.RequestException as error:
            return 0, f"no answer ({error})"
        return answer.status_code, answer.text

    def _state(self) -> list[str]:
        """Return what is wrong with the server between two blocks."""
        if not self.server.alive:
            return [f"the server has ended: {self.server.tail()}"]
        problems = []
        for session in ("fuzz", "another"):
            self._send(Call("POST", "/close_session", {"session_id": session}))
        if not wait_for(self._idle, IDLE_SECONDS):
            problems.append(f"the server is not idle: {self.server.get('/v1/loads')}")
        self.server.post("/tlt/strategy", {"strategy": None})
        if (greedy := self._greedy()) != self._canaries:
            problems.append(f"greedy answers are {greedy} and were {self._canaries}")
        return problems

    def _idle(self) -> bool:
        load = self.server.get("/v1/loads")["loads"][0]
        return not any(load[name] for name in HELD)

    def _greedy(self) -> list[list[int]]:
        sampling = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
        body = {"text": list(CANARIES), "sampling_params": sampling}
        return [answer["output_ids"] for answer in self.server.post("/generate", body)]


def is_right(status: int, text: str) -> bool:
    """Return whether a request may be answered like this."""
    return 200 <= status < 300 or (400 <= status < 500 and is_sentence(text))


def is_sentence(text: str) -> bool:
    """Return whether an error's JSON body holds a message of a few words."""
    try:
        body = json.loads(text)
    except ValueError:
        body = text
    return any(len(each) >= SHORTEST_SENTENCE and " " in each for each in _strings(body))


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for each in inner for text in _strings(each)]
