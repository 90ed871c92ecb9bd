"""Twenty prompts for the default model: instructions, code, lists, repetition, long and short."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import AutoTokenizer

from tests.support.servers import MODEL, model_folder

INSTRUCTIONS = (
    "What is the capital of France, and what is it known for?",
    "Explain to a child why the sky is blue.",
    "Write a short poem about the sea in winter.",
    "A train leaves at 9:40 and arrives at 12:15. How long does the journey take? Think aloud.",
    "Translate into French: 'The cat sleeps on the chair.'",
    "Give me three reasons to learn to cook.",
)
TEXTS = (
    # code
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "SELECT name, COUNT(*) FROM orders\nWHERE",
    "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n",
    # lists
    "The planets of the solar system:\n1. Mercury\n2. Venus\n3.",
    "Shopping list:\n- milk\n- bread\n- butter\n-",
    "January, February, March, April, May, June, July, August,",
    # repetition
    "the quick brown fox jumps over the lazy dog. " * 6,
    "0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6",
    "A B A B A B A B A B",
    # short
    "The",
    "Once upon a time",
)
LONG = (
    "The history of bread is long. People have baked it for thousands of years, from wheat, rye, "
    "barley and oats, in clay ovens and on hot stones. {} remarked that the crust keeps the crumb "
    "fresh, and that a slow rise gives the better taste. In the market of the old town bakers sold "
    "round loaves before sunrise, and the price was set by the council. "
)


@cache
def tokenizer() -> Any:
    """The default model's tokenizer."""
    return AutoTokenizer.from_pretrained(model_folder(MODEL))


def encode(text: str) -> list[int]:
    """Token ids of plain text."""
    ids: list[int] = tokenizer().encode(text, add_special_tokens=False)
    return ids


def instruction(text: str) -> list[int]:
    """Return the token ids of one user message in the model's chat template."""
    messages = [{"role": "user", "content": text}]
    chat = tokenizer().apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return encode(chat)


def long_text(names: tuple[str, ...] = ("A miller", "A monk", "A traveller", "The baker")) -> str:
    """Return a text of some 600 tokens, much of which repeats."""
    return "".join(LONG.format(name) for name in names * 2)


def prompts() -> list[list[int]]:
    """Return the twenty prompts as token ids."""
    ids = [instruction(text) for text in INSTRUCTIONS]
    ids += [encode(text) for text in TEXTS]
    ids.append(encode(long_text()))
    ids.append(instruction("Summarise this text:\n" + long_text(("An abbot", "A carter"))))
    return ids
