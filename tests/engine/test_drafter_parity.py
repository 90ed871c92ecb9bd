"""Our drafters are SGLang's: the same parameters, the same features, the same logits.

A plugin of SGLang's own kind watches the draft model in the engine and writes down what goes in and
what comes out, for our modules to be held against.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.servers import Servers
from tests.support.tiny import greedily, make_target
from tlt_sglang.harvest.sequence import TokenSequence
from tlt_sglang.training import export
from tlt_sglang.training.batches import PackedBatch
from tlt_sglang.training.corpus import Prompt, Response
from tlt_sglang.training.models import Algorithm, DraftConfig, Drafter
from tlt_sglang.training.simulate import Frozen, simulate
from tlt_sglang.training.target import Target, initialise

WATCHER = '''
import os
import torch

TARGET = "sglang.srt.models.llama.LlamaForCausalLM.forward"
count = 0


def loops():
    """Whether the draft model runs in our loop, in the place of SGLang's layers."""
    from tlt_sglang.cpu import decoder

    return any(stack and len(stack.layers[0].embed_norm) for stack in decoder._stacks.values())


def write(mode, ids, positions, hidden, logits, ours):
    global count
    if count < 60:
        seen = {
            "mode": mode, "ids": ids.clone(), "positions": positions.clone(), "hidden": hidden,
            "logits": logits.clone(), "loops": loops(), "ours": ours,
        }
        torch.save(seen, os.path.join(os.environ["WATCHED"], f"{count:03d}.tmp"))
        os.rename(
            os.path.join(os.environ["WATCHED"], f"{count:03d}.tmp"),
            os.path.join(os.environ["WATCHED"], f"{count:03d}.pt"),
        )
        count += 1


def around(original, model, input_ids, positions, forward_batch, *args, **kwargs):
    draft = "Eagle" in type(model).__name__
    before = forward_batch.spec_info.hidden_states.clone() if draft else None
    out = original(model, input_ids, positions, forward_batch, *args, **kwargs)
    if draft:
        mode = forward_batch.forward_mode.name
        write(mode, input_ids, positions, before, out.next_token_logits, False)
    return out


def without_the_framework(original, drafter, ids, hidden, positions, *args):
    before = hidden.clone()
    result = original(drafter, ids, hidden, positions, *args)
    mode = "DECODE" if before.shape[-1] == result[1].shape[-1] else "DRAFT_EXTEND_V2"
    write(mode, ids, positions, before, drafter.logits(result[0]), True)
    return result


def hook():
    import functools
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from tlt_sglang.cpu import drafting

    step = drafting._CpuDrafter.step
    drafting._CpuDrafter.step = functools.partialmethod(
        lambda drafter, *args: without_the_framework(step, drafter, *args)
    )
    HookRegistry.register(TARGET, around, HookType.AROUND)
'''
STEPS = 4
PROMPT = [(7 * i * i + 3 * i + 5) % 400 for i in range(23)]


def watcher(folder: Path) -> dict[str, str]:
    """The environment in which the plugin is found and writes to `folder`/watched."""
    info = folder / "plugin" / "watcher-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "plugin" / "watcher.py").write_text(WATCHER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: watcher\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nwatcher = watcher:hook\n")
    (folder / "watched").mkdir()
    return {"PYTHONPATH": str(folder / "plugin"), "WATCHED": str(folder / "watched")}


def make(folder: Path, target: Target, algorithm: Algorithm) -> tuple[Drafter, Frozen]:
    """A drafter of ours, exported to `folder`."""
    config = DraftConfig.for_target(
        target.config, algorithm, 128 if algorithm == "eagle3" else None
    )
    draft_ids = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(0))
    frozen = target.frozen(draft_ids[: config.draft_vocab_size].sort().values)
    torch.manual_seed(1)
    drafter = Drafter(config)
    initialise(drafter, target)
    with torch.no_grad():
        for parameter in drafter.parameters():  # nothing is left at one or at zero
            # As it is stored, in bfloat16.
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).bfloat16())
    if algorithm == "eagle3":
        frozen = replace(frozen, head=frozen.head.bfloat16().float())
    export.write(
        folder,
        {
            "config.json": export.config_json(config, target.config),
            "model.safetensors": export.tensors(config, drafter.state_dict(), frozen),
        },
    )
    return drafter, frozen


def observed(folder: Path) -> list[dict[str, Any]]:
    """The prefill of PROMPT by the draft model, the steps of the draft after it, and its pass over
    what was committed."""
    report = [torch.load(path) for path in sorted(folder.glob("*.pt"))]
    start = next(i for i, one in enumerate(report) if len(one["ids"]) == len(PROMPT))
    result = report[start : start + STEPS + 1]
    assert [one["mode"] for one in result[:-1]] == ["EXTEND"] + ["DECODE"] * (STEPS - 1)
    return result


@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [("eagle3", "llama"), pytest.param("eagle", "qwen2", marks=pytest.mark.long)],
)
def test_the_engines_drafter_is_ours(
    servers: Servers, tmp_path: Path, algorithm: Algorithm, kind: str
) -> None:
    target = Target(str(make_target(tmp_path / "target", kind, 512)), torch.device("cpu"))
    drafter, frozen = make(tmp_path / "drafter", target, algorithm)
    server = servers.get(
        f"{algorithm}:{STEPS}x1x{STEPS + 1}",
        "--skip-tokenizer-init",
        "--tlt-draft-dtype",
        "float32",
        model=target.path,
        drafter=str(tmp_path / "drafter"),
        environment=watcher(tmp_path),
    )
    output = server.generate(PROMPT, 4)["output_ids"]
    for prompt in (PROMPT, [7], list(range(70))):  # of Qwen3 the same is shown in test_weights
        answer = server.generate(prompt, 40)["output_ids"]
        assert [answer] == greedily(target.model, torch.tensor([prompt]), 40)
    servers.drop(server)
    prefill, *steps, extend = observed(tmp_path / "watched")

    # What the engine feeds: tokens shifted left by one, features where they are.
    assert prefill["ids"].tolist() == [*PROMPT[1:], output[0]]
    assert prefill["positions"].tolist() == list(range(len(PROMPT)))
    ((computed,),) = target.sequences(
        [Response(Prompt(tuple(PROMPT)), tuple(output))], drafter.config
    )
    features = prefill["hidden"]
    torch.testing.assert_close(
        computed.features[: len(PROMPT)].float(), features, rtol=2**-7, atol=1e-3
    )

    assert prefill["loops"] is (algorithm == "eagle3")
    assert {step["ours"] for step in steps} == {algorithm == "eagle3"}
    if algorithm == "eagle3":  # and the same of what was committed, which is all that it is fed
        assert extend["mode"] == "DRAFT_EXTEND_V2"
        count = len(extend["ids"])
        places = torch.arange(len(PROMPT), len(PROMPT) + count)
        assert torch.equal(extend["positions"], places)
        assert extend["ids"].tolist() == output[1 : count + 1]
        torch.testing.assert_close(
            computed.features[places].float(), extend["hidden"], rtol=2**-7, atol=1e-3
        )

    # The draft: the same logits at every step, from the same inputs.
    drafted = torch.cat([step["ids"] for step in steps])
    ids = torch.tensor([*PROMPT, output[0], *drafted.tolist()])
    unknown = torch.zeros(len(ids) - len(PROMPT), features.shape[-1])
    inputs = torch.cat([features, unknown])
    last = inputs[:, : drafter.config.hidden_size]
    batch = PackedBatch.of([TokenSequence(ids, inputs, 1, last)])
    with torch.inference_mode():
        ours = [step.logits[len(PROMPT) - 1] for step in simulate(drafter, frozen, batch, STEPS)]
    for mine, theirs in zip(ours, [prefill, *steps], strict=True):
        torch.testing.assert_close(mine, theirs["logits"][-1], rtol=1e-4, atol=1e-4)
    best = [frozen.draft_ids[logits.argmax()] for logits in ours[:-1]]
    assert torch.stack(best).tolist() == drafted.tolist()


def test_the_config_is_one_that_transformers_reads(tmp_path: Path) -> None:
    """SGLang reads it through transformers' LlamaConfig; nothing is lost on the way."""
    from transformers import AutoConfig

    target = Target(str(make_target(tmp_path / "target", "qwen3", 512)), torch.device("cpu"))
    config = DraftConfig.for_target(target.config, "eagle3", 128)
    (tmp_path / "config.json").write_text(json.dumps(export.config_json(config, target.config)))
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.head_dim == config.head_dim == 32
    assert read.rope_parameters["rope_theta"] == config.rope_theta
    assert (read.draft_vocab_size, read.vocab_size) == (128, 512)
    assert not read.tie_word_embeddings
