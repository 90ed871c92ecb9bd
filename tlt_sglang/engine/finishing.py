"""Where an answer ends: the rule of plain decoding for each token of an accepted run.

A verify step accepts several tokens at once. SGLang looks for the end in all of them together, and
of two ways to stop takes the one that is listed first, not the one that comes first. Here SGLang's
rule for one token is asked for each token in turn, as plain decoding does, and the run is cut at
the first that ends the answer, before anything counts, stores or streams it. Runs in the scheduler
process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tlt_sglang import upstream
from tlt_sglang.upstream.results import AnsweredBatch, AnsweredRequest, DecodeResult, Tokenizer

Rule = Callable[[AnsweredRequest, int], None]
"""SGLang's `Req.update_finish_state`: whether the last tokens of the output, so many, end it."""


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of an answer, or `reason` None if it goes on."""

    reason: object | None = None
    finished_len: int | None = None
    last_token: int = 0
    """The last token of the output, which SGLang replaces if it is outside the vocabulary."""


REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""Stands in texts for bytes that are not a whole character."""
GOES_ON = Ending()


class Finishing:
    """Cuts the accepted runs of a step, and remembers how each request ends until SGLang asks."""

    def __init__(self) -> None:
        self._endings: dict[AnsweredRequest, Ending] = {}
        self._terminated_now: set[AnsweredRequest] = set()
        self._tokenizer: Tokenizer | None = None
        self._byte_level = False

    # -- a verify step, in this order -------------------------------------------------------------

    def accept_in_grammar(
        self,
        advance: Callable[[int], Sequence[int]],
        request: AnsweredRequest,
        tokens: Sequence[int],
    ) -> list[int]:
        """Advance the request's grammar over `tokens`, and return those that it lets pass.

        As in plain decoding, one more token follows the one that terminates the grammar; it is the
        last. `advance` accepts one token and returns it, or nothing if the grammar refuses it.
        """
        grammar = request.grammar
        assert grammar is not None
        passed: list[int] = []
        for token in tokens:
            if grammar.is_terminated():
                grammar.finished = True
                passed.append(token)
                break
            accepted = advance(token)
            if not accepted:
                break
            passed += accepted
        return passed

    def prefill_in_grammar(self, batch: AnsweredBatch) -> None:
        """Note the grammars that the first token of an answer has terminated, once it is accepted.

        Plain decoding asks before it accepts the token.
        """
        self._terminated_now = {
            request
            for request in batch.reqs
            if request.grammar is not None
            and request.grammar.is_terminated()
            and not request.grammar.finished
        }

    def cut(self, batch: AnsweredBatch, result: DecodeResult, runs: list[list[int]]) -> None:
        """Cut each of `runs` where plain decoding ends the answer, and all counts with it.

        `runs` holds one accepted run per request, already counted as committed.
        """
        self._endings.clear()
        sglang = upstream.current()
        for i, request in enumerate(batch.reqs):
            if request.is_retracted or request.finished():
                continue
            run = runs[i]
            if len(run) == 1 and request.grammar is None:
                continue  # SGLang asks its rule when it appends the token, as plain decoding does
            length = self._decide(request, run)
            verified = result.num_correct_drafts_per_req_cpu[i]
            if length < verified + sglang.non_draft_tokens(result):
                _uncount_drafts(request, verified, length)
            if length < len(run):
                sglang.uncommit(request, len(run) - length)
                runs[i] = run[:length]
                sglang.retain(result, i, runs)

    def update(self, rule: Rule, request: AnsweredRequest, new_tokens: int) -> None:
        """Finish the request if its last tokens, `new_tokens` of them, end it."""
        ending = self._endings.pop(request, None) if self._endings else None
        if ending is not None and new_tokens > 0:
            if ending.reason is not None:
                request.finished_reason = ending.reason
                request.finished_len = ending.finished_len
                if request.output_ids[-1] != ending.last_token:
                    request.output_ids[-1] = ending.last_token
        elif request in self._terminated_now:
            self._terminated_now.discard(request)
            grammar, request.grammar = request.grammar, None
            try:
                rule(request, new_tokens)
            finally:
                request.grammar = grammar
        else:
            rule(request, new_tokens)

    def _decide(self, request: AnsweredRequest, run: Sequence[int]) -> int:
        """Return how many tokens of `run` belong to the answer; remember its ending."""
        if not run:
            return 0
        before = len(request.output_ids)
        length = 0
        if self._whole_run_decides(request, run):
            request.output_ids.extend(run)
            request.update_finish_state(len(run))
            length = len(run)
            if request.finished_reason is not None and request.sampling_params.stop_strs:
                _take_back(request, before)
                length = 0
            elif request.finished_len is not None:
                length = request.finished_len - before
        if not length:
            length = _one_by_one(request, run)
        self._endings[request] = (
            GOES_ON
            if request.finished_reason is None
            else Ending(
                request.finished_reason,
                request.finished_len,
                request.output_ids[before + length - 1],
            )
        )
        _take_back(request, before)
        return length

    def _whole_run_decides(self, request: AnsweredRequest, run: Sequence[int]) -> bool:
        """Return whether SGLang's rule for a whole run is right, or right that it goes on.

        It is right of token ids before the limit of the answer; at it, some versions of SGLang do
        not look at them. Of stop strings it is right that there are none, as a string in the text
        of a part of the tokens is also in the text of all of them. This holds where a text is the
        joined bytes of its tokens, and of whole characters.
        """
        parameters = request.sampling_params
        return (
            len(request.output_ids) + len(run) < parameters.max_new_tokens
            and not parameters.stop_regex_strs
            and request.grammar is None
            and request.to_finish is None
            and min(run) >= 0
            and (request.vocab_size is None or max(run) < request.vocab_size)
            and (
                not parameters.stop_strs
                or (
                    self._joins_bytes(request.tokenizer)
                    and not any(REPLACEMENT in stop for stop in parameters.stop_strs)
                )
            )
        )

    def _joins_bytes(self, tokenizer: Tokenizer) -> bool:
        if self._tokenizer is not tokenizer:
            backend = getattr(tokenizer, "backend_tokenizer", None)
            decoder = getattr(backend, "decoder", None)
            self._byte_level = type(decoder).__name__ == "ByteLevel" and not (
                tokenizer.clean_up_tokenization_spaces
            )
            self._tokenizer = tokenizer
        return self._byte_level


def _take_back(request: AnsweredRequest, length: int) -> None:
    """Undo what SGLang's rule has done to the output behind its first `length` tokens."""
    request.finished_reason = request.finished_len = None
    del request.output_ids[length:]


def _one_by_one(request: AnsweredRequest, run: Sequence[int]) -> int:
    """Append the tokens of `run` until one ends the answer; return how many were appended."""
    grammar = request.grammar
    terminated = grammar is not None and grammar.finished
    length = 0
    try:
        for length, token in enumerate(run, 1):
            request.output_ids.append(token)
            # The grammar is past the run. It had terminated before a token only if that is the
            # token which `accept_in_grammar` lets pass as the last.
            request.grammar = grammar if terminated and length == len(run) else None
            request.update_finish_state(1)
            if request.finished_reason is not None:
                break
    finally:
        request.grammar = grammar
    return length


def _uncount_drafts(request: AnsweredRequest, verified: int, length: int) -> None:
    """Count only the accepted drafts among the first `length` tokens, of `verified` in all."""
    returned = min(verified, length)
    if returned == verified:
        return
    request.spec_num_correct_drafts -= verified - returned
    histogram = request.spec_correct_drafts_histogram
    histogram[verified] -= 1
    while histogram and not histogram[-1]:
        histogram.pop()
    request.update_spec_correct_drafts_histogram(returned)


FINISHING = Finishing()
"""The one of this process, where a scheduler runs in it."""
