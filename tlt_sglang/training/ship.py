"""Add a drafter that `tlt train` made to those shipped with this package.

    python -m tlt_sglang.training.ship smollm2-135m RUN

For developers of TLT-SGLang. `models/shipped.py` is the other half, which makes a checkpoint of it
again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tlt_sglang.errors import ConfigError, TltError
from tlt_sglang.models.named import ALIASES
from tlt_sglang.models.shipped import HERE, WEIGHTS

MOST_BYTES = 12_000_000
"""Most bytes of a drafter's weights in the repository."""


def ship(run: Path, into: Path) -> None:
    """Write a drafter into `into`: weights, config.json, and training.json as provenance.

    Raises ConfigError if `run` does not hold an EAGLE-3 drafter, or holds one that is too large.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from tlt_sglang.training import export

    try:
        config = json.loads((run / "config.json").read_text())
        training = json.loads((run / "training.json").read_text())
        weights = load_file(run / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{run} is not the output of `tlt train` ({error}).") from error
    if "d2t" not in weights:
        raise ConfigError(f"{run} is not an EAGLE-3 drafter; only those can be shipped.")
    offsets = weights.pop("d2t")
    for name in ("t2d", "lm_head.weight"):
        del weights[name]
    weights["draft_ids"] = (offsets + torch.arange(len(offsets))).int()
    size = sum(weight.numel() * weight.element_size() for weight in weights.values())
    if size > MOST_BYTES:
        raise ConfigError(f"The drafter in {run} has {size:,} bytes; {MOST_BYTES:,} are the most.")
    export.write(into, {"config.json": config, WEIGHTS: weights, "training.json": training})


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a problem (one sentence)."""
    parser = argparse.ArgumentParser(prog="python -m tlt_sglang.training.ship")
    parser.add_argument("alias", choices=sorted(ALIASES))
    parser.add_argument("run", type=Path, help="the --out of `tlt train`")
    args = parser.parse_args(argv)
    try:
        ship(args.run, HERE / args.alias)
    except TltError as error:
        print(f"ship: {error}", file=sys.stderr)
        return 1
    print(HERE / args.alias)
    return 0


if __name__ == "__main__":
    sys.exit(main())
