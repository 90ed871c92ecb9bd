"""An answer ends where plain decoding ends it, however its tokens are divided into accepted runs.

Requests are SGLang's own, with its stops, grammars and counters. The expected answer is upstream's
unpatched rule for one token at a time. The same tokens then arrive in runs, through the patches.
"""

from __future__ import annotations

import inspect
import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tlt_sglang.patches import patches_for
from tlt_sglang.patching.patcher import Patcher
from tlt_sglang.upstream import versions

pytestmark = pytest.mark.sglang

PROMPT = [7, 8, 9]
VOCABULARY = 320
EOS = 0
SPECIAL = ["<eos>", "<stop>", "<think>"]
THINK_END = 5
STOPS = ("a", "ab", "b c", "the", "e t", "he ", "é", "�", "c" * 9, " ")
REGEXES = ("a$", "^.b", "[bc] ?[a-e]", "(the|cat)", "e.{0,3}t", "$", "[^a]*b")
GRAMMARS = ("[ab]{2}", "(ab|c)*", "the( cat)?", "", "[a-e ]{1,4}")


@cache
def tokenizer(kind: str = "bytes") -> Any:
    """A tokenizer that joins the bytes of its tokens, or ("words") the texts of groups of them."""
    from sglang.srt.utils.hf_transformers_utils import attach_additional_stop_token_ids
    from transformers import PreTrainedTokenizerFast

    bare = _joining_bytes() if kind == "bytes" else _joining_words()
    made = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<eos>")
    attach_additional_stop_token_ids(made)
    return made


def committed(request: Any) -> Any:
    """Return what counts the committed tokens of a request: in some shapes the request itself."""
    kv = getattr(request, "kv", None)
    return kv if hasattr(kv, "kv_committed_len") else request


def _joining_bytes() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "the cat abc ab bc the cab a b c é é ccc ccccc the e t h"
    bare.train_from_iterator([words] * 50, trainer)
    return bare


def _joining_words() -> Any:
    """Each word begins with "▁", of which the first is left out; a lone byte decodes to "�"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    texts = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcthe"]
    pairs = [("a", "b"), ("b", "c"), ("t", "h"), ("▁", "a"), ("▁", "th"), ("c", "c"), ("▁", "c")]
    texts += ["".join(pair) for pair in pairs]
    ids = {text: token for token, text in enumerate(texts)}
    bare = Tokenizer(models.BPE(ids, pairs, byte_fallback=True))
    bare.pre_tokenizer = pre_tokenizers.Metaspace()
    bare.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return bare


@cache
def grammar(regex: str, kind: str) -> Any:
    """The grammar of a regular expression, to be copied for each request."""
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend

    backend = XGrammarGrammarBackend(tokenizer(kind), VOCABULARY, model_eos_token_ids=[EOS])
    return backend.dispatch_regex(regex)


@dataclass(frozen=True)
class Case:
    """The parameters of a request, and what the model is going to say."""

    choices: tuple[int, ...]
    """One number per token: its place among the tokens that are allowed."""
    lengths: tuple[int, ...]
    """Lengths of the accepted runs, repeated as often as needed."""
    limit: int = 8
    stops: tuple[str, ...] = ()
    regexes: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    regex: str | None = None
    """The grammar."""
    kind: str = "bytes"
    """The tokenizer."""

    def request(self) -> Any:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        parameters = SamplingParams(
            max_new_tokens=self.limit,
            stop=list(self.stops) or None,
            stop_regex=list(self.regexes) or None,
            stop_token_ids=sorted(self.stop_ids) or None,
            ignore_eos=self.ignore_eos,
        )
        parameters.normalize(tokenizer(self.kind))
        request = Req(
            "request",
            "",
            array("q", PROMPT),
            parameters,
            eos_token_ids={EOS},
            vocab_size=VOCABULARY,
            require_reasoning=True,
        )
        request.tokenizer = tokenizer(self.kind)
        if self.regex is not None:
            request.grammar = grammar(self.regex, self.kind).copy()
        committed(request).kv_committed_len = len(PROMPT)
        return request

    def token(self, request: Any, i: int) -> int:
        """Return what the model says next, within the request's grammar as long as it lasts."""
        choice = self.choices[i % len(self.choices)]
        if request.grammar is None or request.grammar.is_terminated():
            return choice
        mask = request.grammar.allocate_vocab_mask(VOCABULARY, 1, "cpu")
        request.grammar.fill_vocab_mask(mask, 0)
        words = mask[0].tolist()
        allowed = [t for t in range(VOCABULARY) if words[t // 32] >> (t % 32) & 1]
        return allowed[choice % len(allowed)]

    def runs(self, tokens: Sequence[int]) -> Iterator[list[int]]:
        """Yield `tokens`, the first alone as after a prefill, and then in runs."""
        yield [tokens[0]]
        start = 1
        for length in itertools.cycle(self.lengths):
            if start >= len(tokens):
                return
            yield list(tokens[start : start + length])
            start += length


@dataclass
class Answer:
    """The tokens, reason and counts of a finished request."""

    tokens: list[int]
    reason: dict[str, Any]
    reasoning: int
    committed: int
    drafts: int = field(compare=False, default=0)


def answer(request: Any) -> Answer:
    assert request.finished()
    end = len(request.output_ids) if request.finished_len is None else request.finished_len
    return Answer(
        list(request.output_ids[:end]),
        request.finished_reason.to_json(),
        request.reasoning_tokens,
        committed(request).kv_committed_len,
        request.spec_num_correct_drafts,
    )


@pytest.fixture(autouse=True, scope="module")
def patched() -> Iterator[None]:
    """Apply the patches; `inspect.unwrap` gives the functions of SGLang."""
    files = ("batch_result_processor.py", "schedule_batch.py", "xgrammar_backend.py")
    patches = patches_for(versions.installed())
    mine = [patch for patch in patches if patch.file.rpartition("/")[2] in files]
    patcher = Patcher(mine, "cpu")
    patcher.apply()
    yield
    patcher.revert()


@cache
def processor() -> Any:
    """SGLang's, with as much around it as deciding the end of an answer needs."""
    from sglang.srt.managers.scheduler_components.batch_result_processor import (
        SchedulerBatchResultProcessor,
    )

    bare = object.__new__(SchedulerBatchResultProcessor)
    quiet = SimpleNamespace(
        snapshot_spec_decode_metrics=lambda *_: None,
        on_verify_complete_cpu=lambda *_, **__: None,
    )
    object.__setattr__(bare, "metrics_reporter", quiet)
    object.__setattr__(bare, "model_worker", quiet)
    return bare


def plainly(case: Case) -> tuple[Answer, list[int]]:
    """Answer as plain decoding does; return also what the model says, and would go on to say.

    The order is that of SGLang's process_batch_result_decode.
    """
    request = case.request()
    tokens: list[int] = []
    finish = inspect.unwrap(type(request).update_finish_state)
    accept = inspect.unwrap(type(processor())._accept_grammar_tokens)
    while not request.finished():
        tokens.append(case.token(request, len(tokens)))
        request.output_ids.append(tokens[-1])
        committed(request).kv_committed_len += len(tokens) > 1
        request.update_reasoning_tokens(tokens[-1:], [THINK_END])
        finish(request)
        if request.grammar is not None:
            accept(processor(), request, tokens[-1:])
            request.grammar.finished = request.finished()
    expected = answer(request)
    for _ in range(max(case.lengths)):
        tokens.append(case.token(request, len(tokens)))
        if request.grammar is not None:
            request.grammar.accept_token(tokens[-1])
    return expected, tokens


def in_runs(case: Case, tokens: Sequence[int], early: bool) -> Answer:
    """Answer from accepted runs, as SGLang does after a prefill and each verify step.

    With `early` the grammar accepts a run before anybody asks for its end, as overlap scheduling
    does.
    """
    import torch
    from sglang.srt.managers.utils import GenerationBatchResult
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    request, resolver = case.request(), processor()
    for i, run in enumerate(case.runs(tokens)):
        request.inflight_middle_chunks = 0
        mode = ForwardMode.DECODE if i else ForwardMode.EXTEND
        batch: Any = SimpleNamespace(
            reqs=[request], forward_mode=mode, has_grammar=request.grammar is not None
        )
        result = GenerationBatchResult(
            next_token_ids=torch.tensor(run),
            accept_lens=torch.tensor([len(run)]) if i else None,
            speculative_num_draft_tokens=len(run),
        )
        if early and hasattr(resolver, "advance_grammar_fsm"):
            resolver.advance_grammar_fsm(result, batch)
        accepted = resolver._resolve_spec_v2_tokens(result, batch)[0] if i else run
        request.output_ids.extend(accepted)
        request.update_reasoning_tokens(accepted, [THINK_END])
        request.update_finish_state(len(accepted))
        if request.grammar is not None:
            if not i and not getattr(result, "grammar_advanced", False):
                request.grammar.accept_token(run[0])
            request.grammar.finished = request.finished()
        if request.finished():
            assert len(request.output_ids) == len(answer(request).tokens)
            return answer(request)
    raise AssertionError(f"not finished after {tokens}: {request.output_ids}")


def compare(case: Case, early: bool) -> None:
    expected, tokens = plainly(case)
    got = in_runs(case, tokens, early)
    assert got == expected
    assert got.drafts == drafts(case, len(expected.tokens))


def drafts(case: Case, length: int) -> int:
    """Return how many of the first `length` tokens are drafts: the last of a run is a bonus."""
    count = 0
    done = 1
    for run in itertools.cycle(case.lengths):
        if done >= length:
            return count
        count += min(run - 1, length - done)
        done += run
    raise AssertionError


letters = st.sampled_from(
    [EOS, 1, 2, THINK_END, *range(67, 75), 105, 130, 172, 198, *range(259, 273), -1, VOCABULARY]
)
cases = st.builds(
    Case,
    choices=st.lists(letters, min_size=1, max_size=12).map(tuple),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    limit=st.integers(1, 14),
    stops=st.lists(st.sampled_from(STOPS), max_size=3).map(tuple),
    regexes=st.lists(st.sampled_from(REGEXES), max_size=2).map(tuple),
    stop_ids=st.frozensets(st.sampled_from([1, 68, 69, 260, 270]), max_size=2),
    ignore_eos=st.booleans(),
    regex=st.none() | st.sampled_from(GRAMMARS),
    kind=st.sampled_from(["bytes", "words"]),
)


# "the cat": a stop listed second comes first; " c" is token 263, and "at" 270.
SECOND = Case((262, 263, 270), (3,), stops=("cat", " c"))


@example(case=SECOND, early=False)
@example(case=replace(SECOND, stops=("cat",), stop_ids=frozenset([263])), early=False)
@example(case=replace(SECOND, stops=("cat",), limit=2), early=False)
@example(case=replace(SECOND, stops=(), regexes=("cat", " c")), early=False)
@example(case=replace(SECOND, stops=(), regex="", ignore_eos=True), early=True)
@example(case=Case((1, EOS), (2,), limit=3), early=False)  # the end, and the limit behind it
@pytest.mark.filterwarnings("ignore:max_rollback_tokens")
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases, early=st.booleans())
def test_runs_end_where_plain_decoding_ends(case: Case, early: bool) -> None:
    compare(case, early)
