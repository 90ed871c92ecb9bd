"""Weight updates through SGLang's sessions: the target's change the output, the drafter's do not.

They also show that weights packed for the CPU are packed anew: an output after an update is the one
that transformers computes with the same weights, and restoring them restores output and accept
length exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from identity import Reference
from safetensors.torch import load_file
from servers import MODEL, Server, Servers, model_folder
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.server("eagle:3x1x4")

STRATEGY = "eagle:3x1x4"
CHANGED = ("model.layers.3.mlp.down_proj.weight", "model.layers.20.self_attn.q_proj.weight")
TOKENS = 48


@pytest.fixture(scope="module", autouse=True)
def share_through_files() -> Iterator[None]:
    """Tensors go to an unrelated process: by files, as file descriptors cannot be passed."""
    sharing: Any = torch.multiprocessing
    before = sharing.get_sharing_strategy()
    sharing.set_sharing_strategy("file_system")
    yield
    sharing.set_sharing_strategy(before)
    for child in psutil.Process().children():
        if child.name() == "torch_shm_manager":  # torch starts it for this way of sharing
            child.kill()
            child.wait()


@pytest.fixture
def server(servers: Servers, drafters: dict[str, str]) -> Server:
    return servers.get(STRATEGY, drafter=drafters["eagle"])


def update(server: Server, selector: str, tensors: dict[str, torch.Tensor]) -> None:
    """One session: begin, load, end."""
    from sglang.srt.utils import MultiprocessingSerializer

    named = [(name, tensor.clone().contiguous()) for name, tensor in tensors.items()]
    body = {
        "serialized_named_tensors": [MultiprocessingSerializer.serialize(named, output_str=True)],
        "selector": selector,
        "flush_cache": True,
    }
    for path, content in (
        ("/begin_weight_update", {"selector": selector}),
        ("/update_weights_from_tensor", body),
        ("/end_weight_update", {}),
    ):
        answer = server.post(path, content)
        assert answer["success"], (path, answer)


def ask(server: Server, reference: Reference) -> tuple[list[list[int]], float]:
    """Greedy outputs of a few prompts, and their accept length."""
    server.post("/flush_cache")
    answers = [server.generate(prompt, TOKENS) for prompt in reference.prompts[:4]]
    rounds = sum(answer["meta_info"]["spec_verify_ct"] for answer in answers)
    return [answer["output_ids"] for answer in answers], len(answers) * TOKENS / rounds


def transformers_outputs(reference: Reference, weights: dict[str, torch.Tensor]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(model_folder(MODEL), dtype=torch.float32)
    model.load_state_dict(weights, strict=False)
    outputs = []
    for prompt in reference.prompts[:4]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS,
                eos_token_id=None,
            )  # fmt: skip
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


def test_a_drafter_update_changes_only_the_accept_length(
    server: Server, reference: Reference, drafters: dict[str, str]
) -> None:
    outputs, length = ask(server, reference)
    assert length > 1.3
    original = load_file(f"{drafters['eagle']}/model.safetensors")["fc.weight"]
    update(server, "draft", {"fc.weight": torch.randn_like(original) * original.std()})
    worse, shorter = ask(server, reference)
    assert worse == outputs
    assert shorter < length - 0.2
    update(server, "draft", {"fc.weight": original})
    assert ask(server, reference) == (outputs, length)


def test_a_target_update_changes_the_output_and_not_the_drafter(
    server: Server, reference: Reference
) -> None:
    outputs, length = ask(server, reference)
    stored: dict[str, Any] = load_file(model_folder(MODEL) / "model.safetensors")
    original = {name: stored[name] for name in CHANGED}
    generator = torch.Generator().manual_seed(0)
    changed = {
        name: tensor * (1 + 0.3 * torch.randn(tensor.shape, generator=generator))
        for name, tensor in original.items()
    }
    update(server, "target", changed)
    updated, _ = ask(server, reference)
    assert updated != outputs
    assert updated == transformers_outputs(reference, changed)
    # Had the drafter been touched, its accept length would not come back to the digit.
    update(server, "target", original)
    assert ask(server, reference) == (outputs, length)


def test_a_tied_head_is_packed_anew(server: Server, reference: Reference) -> None:
    """The default model's head is its embedding; an update of it reaches both."""
    outputs, _ = ask(server, reference)
    name = "model.embed_tokens.weight"
    original = load_file(model_folder(MODEL) / "model.safetensors")[name]
    turned = original.clone()
    turned[: len(turned) // 2] *= 0.9
    update(server, "target", {name: turned})
    updated, _ = ask(server, reference)
    assert updated != outputs
    assert updated == transformers_outputs(reference, {name: turned, "lm_head.weight": turned})
    update(server, "target", {name: original})
    assert ask(server, reference)[0] == outputs
