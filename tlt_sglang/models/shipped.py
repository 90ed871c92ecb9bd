"""Drafters that are shipped with this package, for the models with an alias.

The package contains only the trained weights, in bfloat16. The head and the vocabulary maps of an
EAGLE-3 checkpoint are copies of the target's, three times as large as the rest, and are added once,
in a cache folder beside the model. Runs in the launcher; it loads torch only to make that folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.models.cache import build, cache_root, is_complete
from tlt_sglang.models.named import ALIASES, prepare

FILES = ("config.json", "model.safetensors")
HERE = Path(__file__).parent
WEIGHTS = "weights.safetensors"
TRAINING = "training.json"


def default_drafter(model: str) -> Path | None:
    """Return the drafter's folder for an alias or its prepared folder; None for other models.

    Raises EnvironmentProblem if the cache cannot be written.
    """
    for alias in ALIASES:
        source = HERE / alias
        if not (source / WEIGHTS).exists():
            continue
        if model == alias or _is_prepared(model, alias):
            return _prepared(alias, source)
    return None


def _is_prepared(model: str, alias: str) -> bool:
    """Return whether a model is the prepared folder of an alias; prepare none for any other."""
    path = Path(model).expanduser()
    may_be = path.parent == cache_root() / "models" and path.name.startswith(f"{alias}-")
    return may_be and path == prepare(alias)


def _prepared(alias: str, source: Path) -> Path:
    target = prepare(alias)
    digest = hashlib.sha256(target.name.encode())
    for name in ("config.json", WEIGHTS):
        digest.update((source / name).read_bytes())
    folder = cache_root() / "drafters" / f"{alias}-{digest.hexdigest()[:12]}"
    if not is_complete(folder, FILES):
        build(folder, lambda into: _expand(source, target, into), FILES)
    return folder


def _expand(source: Path, target: Path, into: Path) -> None:
    """Write the complete checkpoint, which SGLang can load, into `into`."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    weights = load_file(source / WEIGHTS)
    ids = weights.pop("draft_ids").long()
    config = json.loads((source / "config.json").read_text())
    with safe_open(target / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
        name = "lm_head.weight" if "lm_head.weight" in names else "model.embed_tokens.weight"
        head = stored.get_tensor(name)
    if len(head) != config["vocab_size"]:
        raise EnvironmentProblem(
            f"The drafter {source.name} does not fit the model in {target}; delete that folder."
        )
    weights["lm_head.weight"] = head[ids].bfloat16()
    weights["d2t"] = ids - torch.arange(len(ids))
    weights["t2d"] = torch.zeros(len(head), dtype=torch.bool).index_fill(0, ids, True)
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    (into / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(source / TRAINING, into / TRAINING)  # `tlt train --start-from` copies it
