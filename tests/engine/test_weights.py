"""Weight updates: the target's change the output and not the drafter, the drafter's the opposite.

They also show that weights packed for the CPU are packed anew: an output after an update is the one
that transformers computes with the same weights, and restoring them restores output and accept
length exactly. Through SGLang's sessions, and from disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.identity import Reference, each
from tests.support.lacking import unless_lacking
from tests.support.servers import MODEL, Server, Servers, model_folder
from tests.support.tiny import make_target
from tests.support.trainer import trainer
from tlt_sglang.patches import patches_for
from tlt_sglang.upstream import versions

CHANGED = ("model.layers.3.mlp.down_proj.weight", "model.layers.20.self_attn.q_proj.weight")
TOKENS = 48
SESSIONS = any(
    patch.target.endswith(".begin_weight_update") for patch in patches_for(versions.installed())
)
"""True if this SGLang has sessions of updates, and with them selectors."""


pytestmark = pytest.mark.usefixtures("share_through_files")


@pytest.fixture(scope="session")
def share_through_files(servers: Servers) -> Iterator[None]:
    """Tensors go to an unrelated process: by files, as file descriptors cannot be passed.

    For the whole session, since torch looks for the manager that it has started once. It ends
    before `servers` looks for processes that are left.
    """
    sharing: Any = torch.multiprocessing
    before = sharing.get_sharing_strategy()
    sharing.set_sharing_strategy("file_system")
    yield
    sharing.set_sharing_strategy(before)
    for child in psutil.Process().children():
        if child.name() == "torch_shm_manager":  # torch starts it for this way of sharing
            child.kill()
            child.wait()


def load(server: Server, tensors: dict[str, torch.Tensor], **fields: Any) -> dict[str, Any]:
    """Send tensors without a session; return the answer."""
    from sglang.srt.utils import MultiprocessingSerializer

    named = [(name, tensor.clone().contiguous()) for name, tensor in tensors.items()]
    sent = [MultiprocessingSerializer.serialize(named, output_str=True)]
    body = {"serialized_named_tensors": sent, "flush_cache": True}
    answer: dict[str, Any] = server.post("/update_weights_from_tensor", body | fields)
    assert answer["success"], answer
    return answer


def update(server: Server, selector: str | None, tensors: dict[str, torch.Tensor]) -> None:
    """One session: begin, load, end; None names no selector. Without sessions, load alone."""
    if not SESSIONS:
        assert selector != "draft"
        load(server, tensors)
        return
    fields = {} if selector is None else {"selector": selector}
    with session(server, fields):
        load(server, tensors, **fields)


@contextmanager
def session(server: Server, fields: dict[str, Any]) -> Iterator[None]:
    """Begin and end a session."""
    assert server.post("/begin_weight_update", fields)["success"]
    yield
    assert server.post("/end_weight_update", {})["success"]


def checksums(server: Server, selector: str) -> dict[str, str]:
    """SGLang's checksum of every tensor of the target or of the drafter."""
    answer = server.post("/weights_checker", {"action": "checksum"} | named(selector))
    result: dict[str, str] = answer["ranks"][0]["checksums"]
    if not SESSIONS:  # those of both, the drafter's with a prefix
        of_drafter = selector == "draft"
        result = {k: v for k, v in result.items() if k.startswith("draft.") == of_drafter}
    assert result
    return result


def named(selector: str) -> dict[str, str]:
    """The field for a selector, where SGLang knows selectors."""
    return {"selector": selector} if SESSIONS else {}


def ask(server: Server, prompts: Sequence[list[int]]) -> tuple[list[list[int]], float]:
    """Greedy outputs, made from an empty cache, and their accept length."""
    server.post("/flush_cache?timeout=10")  # the request before may still be leaving its batch
    answers = [server.generate(prompt, TOKENS) for prompt in prompts]
    rounds = sum(answer["meta_info"]["spec_verify_ct"] for answer in answers)
    return [answer["output_ids"] for answer in answers], len(answers) * TOKENS / rounds


def transformers_outputs(
    folder: Path, prompts: Sequence[list[int]], weights: dict[str, torch.Tensor]
) -> list[list[int]]:
    """Generate with transformers, with some weights of the checkpoint replaced."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=TOKENS,
                eos_token_id=None,
            )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


def changed(original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with noise, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensor * (1 + 0.3 * torch.randn(tensor.shape, generator=generator))
        for name, tensor in original.items()
    }


def stored(*names: str) -> dict[str, torch.Tensor]:
    """Tensors of the default model's checkpoint."""
    weights: dict[str, torch.Tensor] = load_file(model_folder(MODEL) / "model.safetensors")
    return {name: weights[name] for name in names}


needs_sessions = unless_lacking("have no sessions")


def test_a_lack_of_sessions_is_listed() -> None:
    assert needs_sessions.args == (not SESSIONS,)


@needs_sessions
@each(["eagle:3x1x4"])
def test_a_drafter_update_changes_only_the_accept_length(
    server: Server, reference: Reference, drafters: dict[str, str]
) -> None:
    prompts = reference.prompts[:4]
    outputs, length = ask(server, prompts)
    target = checksums(server, "target")
    assert length > 1.3
    original = load_file(f"{drafters['eagle']}/model.safetensors")["fc.weight"]
    update(server, "draft", {"fc.weight": torch.randn_like(original) * original.std()})
    worse, shorter = ask(server, prompts)
    assert worse == outputs
    assert shorter < length - 0.2
    assert checksums(server, "target") == target
    update(server, "draft", {"fc.weight": original})
    assert ask(server, prompts) == (outputs, length)
    assert checksums(server, "target") == target


@each(["eagle:3x1x4"])
def test_a_target_update_changes_the_output_and_not_the_drafter(
    server: Server, reference: Reference
) -> None:
    prompts = reference.prompts[:2]
    outputs, length = ask(server, prompts)
    target, drafter = checksums(server, "target"), checksums(server, "draft")
    original = stored(*CHANGED)
    update(server, "target", changed(original))
    updated, _ = ask(server, prompts)
    assert updated != outputs
    assert updated == transformers_outputs(model_folder(MODEL), prompts, changed(original))
    assert checksums(server, "draft") == drafter
    assert checksums(server, "target") != target
    update(server, "target", original)
    assert ask(server, prompts) == (outputs, length)
    assert checksums(server, "target") == target


@each(["eagle:3x1x4"])
def test_a_tied_head_is_packed_anew(server: Server, reference: Reference) -> None:
    """The default model's head is its embedding; an update of it reaches both."""
    prompts = reference.prompts[:2]
    outputs, _ = ask(server, prompts)
    name = "model.embed_tokens.weight"
    original = stored(name)[name]
    turned = original.clone()
    turned[: len(turned) // 2] *= 0.9
    update(server, "target", {name: turned})
    updated, _ = ask(server, prompts)
    assert updated != outputs
    both = {name: turned, "lm_head.weight": turned}
    assert updated == transformers_outputs(model_folder(MODEL), prompts, both)
    update(server, "target", {name: original})
    assert ask(server, prompts)[0] == outputs


@each(["eagle3:3x4x8"], quick=0)
def test_the_engine_does_not_grow_with_updates(server: Server, reference: Reference) -> None:
    """Packed weights take the memory of those before them; the first two updates may take some."""
    folder = model_folder(MODEL)
    scheduler = psutil.Process(server.scheduler()["pid"])
    sizes = []
    for _ in range(5):
        assert server.post("/update_weights_from_disk", {"model_path": str(folder)})["success"]
        ask(server, reference.prompts[:1])
        sizes.append(scheduler.memory_info().rss)
    assert sizes[-1] - sizes[1] < (folder / "model.safetensors").stat().st_size / 2, sizes


# ---- the target's update on every path, with a separate drafter ----------------------------------

SHARED_NAMES = ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight", *CHANGED)
"""Tensors of the target, of which the drafter has the first two under the same names."""
Tensors = dict[str, torch.Tensor]
PATHS: dict[str, Callable[[Server, Tensors, Path], object]] = {
    "a session for all": lambda server, new, _: update(server, "all", new),
    "a session without a selector": lambda server, new, _: update(server, None, new),
    "a tensor update without a session": lambda server, new, _: load(server, new),
    "a distributed update in a session": lambda server, new, _: from_trainer(server, new, True),
    "a distributed update alone": lambda server, new, _: from_trainer(server, new, False),
    "an update from disk": lambda server, new, folder: from_disk(server, new, folder),
}
"""Ways to update the target with `new` tensors; IPC, which needs a GPU, is in tests/patches."""
IN_SESSIONS = (
    "a session for all",
    "a session without a selector",
    "a distributed update in a session",
)


def from_trainer(server: Server, new: Tensors, in_session: bool) -> None:
    """Send tensors through a process group of gloo's, two calls for one update."""
    halves = [dict(list(new.items())[part::2]) for part in (0, 1)]
    with trainer(server) as client, session(server, {}) if in_session else nullcontext():
        for half in halves:
            answer = client.send(half)
            assert answer["success"], answer


def from_disk(server: Server, new: Tensors, folder: Path) -> None:
    """Let the server read a checkpoint in which `new` tensors replace the stored ones."""
    shutil.copytree(model_folder(MODEL), folder, dirs_exist_ok=True)
    weights = load_file(model_folder(MODEL) / "model.safetensors") | new
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert server.post("/update_weights_from_disk", {"model_path": str(folder)})["success"]


@pytest.fixture(scope="module")
def updated_answers() -> dict[str, object]:
    """Return what a server answers after an update for "target" alone, once it has been asked."""
    return {}


@pytest.mark.parametrize("path", [path for path in PATHS if SESSIONS or path not in IN_SESSIONS])
@each(["eagle3:3x4x8"])
def test_an_update_of_the_target_never_reaches_the_drafter(
    server: Server,
    reference: Reference,
    path: str,
    tmp_path: Path,
    updated_answers: dict[str, object],
) -> None:
    """Bit by bit; output and accept length are those after an update for "target" alone."""
    prompts = reference.prompts[:2]
    before, drafter, target = (
        ask(server, prompts),
        checksums(server, "draft"),
        checksums(server, "target"),
    )
    original = stored(*SHARED_NAMES)
    new = changed(original)
    if not updated_answers:
        update(server, "target", new)
        updated_answers["target"] = ask(server, prompts)
        assert ask(server, prompts)[0] == transformers_outputs(model_folder(MODEL), prompts, new)
        update(server, "target", original)
    PATHS[path](server, new, tmp_path)
    assert ask(server, prompts) == updated_answers["target"]
    assert before[0] != ask(server, prompts)[0]
    assert checksums(server, "draft") == drafter
    assert checksums(server, "target") != target
    PATHS[path](server, original, tmp_path)
    assert ask(server, prompts) == before
    assert checksums(server, "draft") == drafter
    assert checksums(server, "target") == target


@needs_sessions
@each(["eagle:3x1x4"])
def test_an_update_that_names_the_drafter_reaches_it(
    server: Server, reference: Reference, drafters: dict[str, str]
) -> None:
    """In a session for all, and without a session."""
    prompts = reference.prompts[:2]
    before, drafter, target = (
        ask(server, prompts),
        checksums(server, "draft"),
        checksums(server, "target"),
    )
    original = load_file(f"{drafters['eagle']}/model.safetensors")["fc.weight"]
    other = {"fc.weight": torch.randn_like(original) * original.std()}
    with session(server, {"selector": "all"}):
        load(server, other, selector="draft")
    worse, shorter = ask(server, prompts)
    assert worse == before[0] and shorter < before[1]
    assert checksums(server, "draft") != drafter
    load(server, {"fc.weight": original}, selector="draft")
    assert ask(server, prompts) == before
    assert checksums(server, "draft") == drafter
    assert checksums(server, "target") == target


@needs_sessions
def test_a_drafter_that_an_update_has_cost_its_drafts(
    servers: Servers, reference: Reference, drafters: dict[str, str]
) -> None:
    """The log, the status and the metrics say so; the status takes it back with new drafts."""
    server = servers.get("eagle:3x1x4", "--enable-metrics", drafter=drafters["eagle"])
    prompts = reference.prompts
    original = load_file(f"{drafters['eagle']}/model.safetensors")
    ask(server, prompts)
    outputs, length = ask(server, prompts)
    assert length > 1.3
    assert server.scheduler()["weight_updates"]["warning"] is None
    assert "tlt_drafts_lost_total 0.0" in server.get("/metrics")
    update(server, "draft", {name: torch.zeros_like(one) for name, one in original.items()})
    assert ask(server, prompts)[0] == outputs
    state = server.scheduler()["weight_updates"]
    assert state["accept_length_before"] > 1.3 and state["accept_length_since"] < 1.02
    assert state["warning"].startswith("The accept length is 1.0")
    assert state["warning"] in server.log()
    assert "tlt_drafts_lost_total 1.0" in server.get("/metrics")
    update(server, "draft", original)
    ask(server, prompts)
    assert ask(server, prompts)[0] == outputs
    assert server.scheduler()["weight_updates"]["warning"] is None
    servers.drop(server)


def test_a_head_of_its_own_and_norms(servers: Servers, tmp_path: Path) -> None:
    """A Qwen3, whose head is not tied, and which has norms on queries and keys."""
    folder = make_target(tmp_path / "qwen3", "qwen3", 512)
    server = servers.get("eagle3:3x4x8", "--skip-tokenizer-init", model=str(folder))
    prompts = [[5, 9, 14, 3, 20, 7] * 3, list(range(40, 80)), [7]]
    outputs, _ = ask(server, prompts)
    assert outputs == transformers_outputs(folder, prompts, {})
    weights: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    names = (
        "lm_head.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.2.input_layernorm.weight",
        "model.norm.weight",
    )
    for name in names:
        original = {name: weights[name]}
        update(server, "target", changed(original))
        updated, _ = ask(server, prompts)
        assert updated != outputs, name
        assert updated == transformers_outputs(folder, prompts, changed(original)), name
        update(server, "target", original)
        assert ask(server, prompts)[0] == outputs, name
    servers.drop(server)
