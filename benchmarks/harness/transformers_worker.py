"""Generate with transformers, in a process of its own, for `bench_engine` to compare with.

    python -m benchmarks.harness.transformers_worker MODEL THREADS

Writes one JSON line when the model is loaded, then answers each line {"prompt": text, "tokens": N}
of standard input with one on standard output: the seconds between the first and the last token, the
number of prompt tokens, and the ids generated. Greedy, float32, exactly N tokens. Ends with its
input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TextIO


class Clock:
    """A streamer for `generate` that records the time of each piece, the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        """Record the time of a piece."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the last token has been recorded."""


def main() -> None:
    """Serve requests until standard input ends."""
    # Only answers go to standard output; what others print goes to the log.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    # As SGLang's ignore_eos: the end of the text is a token like any other. Without this,
    # min_new_tokens would keep it from being chosen, and the two sides would generate other tokens.
    model.generation_config.eos_token_id = None
    _write(answers, {"threads": torch.get_num_threads()})
    for line in sys.stdin:
        request = json.loads(line)
        inputs = tokenizer(request["prompt"], return_tensors="pt")
        count, clock = request["tokens"], Clock()
        with torch.inference_mode():
            ids = model.generate(
                **inputs,
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                streamer=clock,
            )
        prompt_tokens = inputs["input_ids"].shape[1]
        _write(
            answers,
            {
                "seconds": clock.times[-1] - clock.times[1],
                "prompt_tokens": prompt_tokens,
                "output_ids": ids[0, prompt_tokens:].tolist(),
            },
        )


def _write(answers: TextIO, content: dict[str, object]) -> None:
    print(json.dumps(content), file=answers, flush=True)


if __name__ == "__main__":
    main()
