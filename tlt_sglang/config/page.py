"""Generate docs/configuration.md from the settings.

    python -m tlt_sglang.config.page           print the page
    python -m tlt_sglang.config.page --write   write it to docs/configuration.md of a checkout

A unit test fails when the page is stale.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tlt_sglang.config.setting import Setting
from tlt_sglang.config.settings import SETTINGS

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"

INTRO = """\
# Configuration

<!-- Generated from tlt_sglang/config/settings.py: python -m tlt_sglang.config.page --write -->

A setting has one name, which is spelled `ngram_memory_mb` in a file and `--tlt-ngram-memory-mb` as
a flag. The server, `tlt sidecar` and `tlt coordinator` read the same settings, so one file serves
all of them; each program ignores the settings that it does not use.

## Where settings come from

| Source | Use |
|---|---|
| flags | `--tlt-ngram-memory-mb 128`; the `--help` of a command lists its flags |
| `--tlt-config FILE` | a TOML file |
| `TLT_CONFIG=FILE` | the same file, for RL stacks, which start SGLang without our launcher |
| `TLT_CONFIG='{...}'` | inline JSON with the same names, which our launcher gives its engines |

A flag overrides the file, and the file overrides the default. `--tlt-config` is read instead of
`TLT_CONFIG`, not in addition to it. Without `--adaptive-spec`, `--tlt-config` and `TLT_CONFIG`, TLT
is off, and SGLang runs unchanged.

```toml
# tlt.toml
strategies = ["off", "eagle3:3x1x4", "ngram:8"]
events = "/var/log/tlt-events.jsonl"
store = "/var/lib/tlt/drafters"
sidecar = "idle"
sidecar_threads = 2
```

A bad value stops the program at once, with a sentence that names the value and says what to write.

SGLang's own flags (`--tp`, `--speculative-draft-model-path`, ...) go to the server beside these.
`TLT_DEBUG=1` in the environment shows the traceback of an error.
"""

PROGRAMS = {
    "engine": "engine",
    "launcher": "server",
    "sidecar": "sidecar",
    "coordinator": "coordinator",
}


def page() -> str:
    """Return the whole page."""
    groups = dict.fromkeys(setting.group for setting in SETTINGS.values())
    parts = [INTRO]
    for group in groups:
        rows = [_row(setting) for setting in SETTINGS.values() if setting.group == group]
        header = ("| Setting | Flag | Values | Default | Used by | Meaning |", "|---" * 6 + "|")
        parts.append("\n".join((f"## {group.title}\n\n{group.intro}\n", *header, *rows, "")))
    return "\n".join(parts)


def _row(setting: Setting) -> str:
    """Return the row of one setting."""
    cells = (
        f"`{setting.name}`",
        f"`{setting.flag}{_metavar(setting)}`",
        _values(setting),
        _default(setting),
        ", ".join(PROGRAMS[program] for program in setting.used_by),
        setting.help,
    )
    return f"| {' | '.join(cells)} |"


def _metavar(setting: Setting) -> str:
    kind = setting.kind
    if kind.choices:
        return " NAME"
    return f" {kind.metavar}" if kind.metavar else ""


def _values(setting: Setting) -> str:
    """Return the type of a setting, or its choices."""
    choices = setting.kind.choices
    return ", ".join(f'`"{choice}"`' for choice in choices) if choices else setting.kind.name


def _default(setting: Setting) -> str:
    """Return the default, as TOML has it, or in words."""
    default = setting.default
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if default is None or default == ():
        return setting.default_text
    return f'`"{default}"`' if isinstance(default, str) else f"`{setting.default_text}`"


def main(argv: Sequence[str]) -> int:
    """Print the page, or write it with --write; return the exit status."""
    if list(argv) == ["--write"]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
