"""The default model, de-quantised once, is the model that its GGUF file holds."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tlt_sglang.models import named as models

ALIAS = "smollm2-135m"


def test_the_prepared_model_computes_what_the_gguf_file_does() -> None:
    """The logits of both on a few tokens; and the model answers."""
    folder = models.prepare(ALIAS)
    gguf_file, _ = models._locate(models.ALIASES[ALIAS])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0, 0] == 1
    assert tokenizer.decode(ids[0]) == text

    prepared, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert prepared.dtype == torch.float32
    assert prepared.lm_head.weight.data_ptr() == prepared.model.embed_tokens.weight.data_ptr()
    direct = AutoModelForCausalLM.from_pretrained(
        str(gguf_file.parent), gguf_file=gguf_file.name, dtype=torch.float32
    )
    with torch.inference_mode():
        torch.testing.assert_close(prepared(ids).logits, direct(ids).logits, atol=1e-3, rtol=1e-4)
        answer = prepared.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])
