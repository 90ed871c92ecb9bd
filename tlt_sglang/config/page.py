"""Generate docs/configuration.md from the settings, and docs/refused.md from what is refused.

    python -m tlt_sglang.config.page           print the pages
    python -m tlt_sglang.config.page --write   write them to docs/ of a checkout

A unit test fails when a page is stale.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tlt_sglang.config.refused import ROWS
from tlt_sglang.config.setting import Setting
from tlt_sglang.config.settings import SETTINGS

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
REFUSED = PAGE.with_name("refused.md")

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

REFUSED_INTRO = """\
# What is refused at the start

<!-- Generated from tlt_sglang/config/refused.py: python -m tlt_sglang.config.page --write -->

Some of SGLang's flags, and some drafters, do not work with a feature of TLT. The engine then ends
at the start with one sentence, which names both and says what to leave out. Most rows hold on a GPU
only; the CPU engine has [limits of its own](internals/cpu.md).

| Refused | With | Where | Because |
|---|---|---|---|
"""

REFUSED_END = """
Where SGLang runs a drafter by a worker that TLT does not extend, and several strategies or
`--tlt-store` are configured, the engine ends at the start, too. After the start,
`/update_weights_from_disk` with `recapture_cuda_graph` is refused on a GPU while there are several
strategies.
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


def refused_page() -> str:
    """Return the page of what is refused."""
    table = "".join(
        f"| {row.title} | {', '.join(row.excludes)} "
        f"| {'everywhere' if 'cpu' in row.devices else 'on a GPU'} | {row.reason} |\n"
        for row in ROWS
    )
    return REFUSED_INTRO + table + REFUSED_END


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
    """Print the pages, or write them with --write; return the exit status."""
    if list(argv) == ["--write"]:
        PAGE.write_text(page(), encoding="utf-8")
        REFUSED.write_text(refused_page(), encoding="utf-8")
    else:
        print(page(), refused_page(), sep="\n", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
