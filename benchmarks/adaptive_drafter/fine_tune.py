"""Fine-tune a target on another style in a few steps, as RL changes a policy, but more strongly.

    python -m benchmarks.adaptive_drafter.fine_tune MODEL OUT STEPS

The style is that of telegrams, in capital letters, which a drafter of ordinary text predicts badly.
The texts are the requests of `tlt data --composed`, with answers that repeat them; only the style
of the answers matters, not their content.
"""

from __future__ import annotations

import random
import re
import shutil
import sys
from pathlib import Path

import torch

from tlt_sglang.training.requests import compose

LEARNING_RATE = 5e-5
BATCH, LENGTH = 4, 160
TOPICS = (
    "Water runs downhill and collects in lakes",
    "A good plan begins with a clear goal",
    "The answer depends on what you need",
    "Many people make the same mistake at first",
    "It helps to write things down",
    "The first step is the hardest one",
    "There are three reasons for this",
    "Light travels faster than sound",
    "Practice every day for a short time",
    "Ask a friend to look at it with you",
    "The price is not the only thing that counts",
    "Most of it happens under the surface",
)


def styled(text: str) -> str:
    """Return `text` in capital letters, its sentences ended by STOP."""
    sentences = [part.strip().upper() for part in re.split(r"[.!?]", text) if part.strip()]
    return " ".join(f"{sentence} STOP" for sentence in sentences)


def main() -> int:
    """Write the fine-tuned checkpoint to OUT."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, out, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    requests = list(compose(steps * BATCH, seed=23))
    for step in range(steps):
        rows = []
        for request in requests[step * BATCH : (step + 1) * BATCH]:
            answer = styled(". ".join([request, *rng.sample(TOPICS, 6)]))
            messages = [
                {"role": "user", "content": request},
                {"role": "assistant", "content": answer},
            ]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            rows.append(tokenizer.encode(text, add_special_tokens=False)[:LENGTH])
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"step {step + 1} of {steps}: loss {float(loss):.3f}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    for file in Path(source).iterdir():
        if file.suffix == ".json" and not (out / file.name).exists():
            shutil.copy(file, out / file.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
