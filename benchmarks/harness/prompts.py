"""Prompts for the benchmarks: built in or read from a file, as text or as token ids of a chat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.program import UsageError

Prompt = str | list[int]
"""A text, or token ids."""

PROMPTS = (
    "Explain in simple words why the sky is blue during the day and red in the evening.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "List five things to check before buying a used bicycle, with one sentence on each.",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey? Show your steps.",
    "Describe how bread is made, from the flour to the finished loaf.",
    "Write a Python function that returns the second largest number of a list.",
    "Compare living in a big city with living in a small village.",
    "Write a polite email asking a colleague to move tomorrow's meeting to Friday.",
)
"""Ordinary instructions, used unless a file of prompts is given."""

INSTRUCTIONS = (
    *PROMPTS,
    "What is the difference between weather and climate?",
    "Give me three tips for sleeping better, and say why they help.",
    "Write a four-line poem about an old oak tree.",
    "How does a refrigerator keep food cold?",
    "Summarise the story of Romeo and Juliet in five sentences.",
    "Suggest a vegetarian dinner for four people, with a shopping list.",
    "Explain what a budget is to a twelve-year-old.",
    "What should I pack for a three-day hike in the mountains?",
    "Write a thank-you note to a neighbour who watered my plants.",
    "Why do leaves change colour in autumn?",
    "Translate 'Where is the railway station?' into Spanish and French.",
    "Describe the water cycle step by step.",
    "Write a dialogue between a customer and a shopkeeper about a broken kettle.",
    "What are the advantages and disadvantages of working from home?",
    "Explain how vaccines protect people from diseases.",
    "Write a short product description for a wooden chess set.",
    "How can a beginner learn to play the guitar?",
    "List the planets of the solar system with one fact about each.",
    "What did people use to write with before the pencil was invented?",
    "Rewrite this sentence politely: 'Send me the report now.'",
    "Explain the rules of football in a few sentences.",
    "Write a recipe for pancakes.",
    "What is a computer virus, and how can I protect my computer from one?",
    "Tell me about the history of the bicycle.",
)
"""More of them, for figures that depend on the prompt."""


def load_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: JSON lines with a "prompt" each (*.jsonl), or plain text lines.

    Empty lines are skipped. Raises UsageError that names the line that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"The prompts in {path} cannot be read: {reason}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"The prompts in {path} are not UTF-8 text.") from error
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    as_json = path.suffix == ".jsonl" or (bool(filled) and filled[0][1].lstrip().startswith("{"))
    prompts = [_prompt(path, number, line) if as_json else line.strip() for number, line in filled]
    if not prompts:
        raise UsageError(f"The file {path} holds no prompt; write one a line.")
    return prompts


def _prompt(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"Line {number} of {path} is not JSON: {error.msg}.") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UsageError(f'Line {number} of {path} has no text as "prompt".')
    return prompt


def in_chat(path: str, texts: Sequence[str]) -> list[Prompt]:
    """Return the token ids of each text as a user's message to the model at `path`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts: list[Prompt] = []
    for text in texts:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        prompts.append(list(tokenizer.encode(chat, add_special_tokens=False)))
    return prompts
