"""Write existing result files without the absolute paths of the machine that made them.

    python -m benchmarks.scrub [FILE ...]      # default: all of benchmarks/results

New results have none (see `harness.provenance`). Only the leading folders of a path are replaced:
home folders by `~`, temporary ones by `$TMPDIR`, and the repository's by nothing.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.harness.provenance import RESULTS, portable, replace_prefixes, write_json

OTHER_MACHINES = {"/root": "~", "/tmp": "$TMPDIR"}
"""Home and temporary folders of the machines that results have come from."""
ABSOLUTE = re.compile(r"(?:^|[\s='\"(,]|://)(/[\w.-]+/[\w./-]+)")
PROSE = ("prompts", "instructions", "problems")
"""Keys with texts in which a slash does not begin a path."""


def absolute_paths(content: object) -> Iterator[str]:
    """Yield the absolute paths in the texts of JSON content, except in prompts."""
    if isinstance(content, str):
        yield from ABSOLUTE.findall(content)
    elif isinstance(content, Mapping):
        for key, value in content.items():
            if key not in PROSE:
                yield from absolute_paths(value)
    elif isinstance(content, list):
        for value in content:
            yield from absolute_paths(value)


def scrub(path: Path) -> bool:
    """Replace the prefixes in a result file; return True if it had any."""
    content = json.loads(path.read_text(encoding="utf-8"))
    portable_content = replace_prefixes(portable(content), OTHER_MACHINES)
    if portable_content == content:
        return False
    write_json(path, portable_content)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Scrub the files; return 1 if an absolute path is left in one of them."""
    names = sys.argv[1:] if argv is None else argv
    status = 0
    for path in [Path(name) for name in names] or sorted(RESULTS.rglob("*.json")):
        if scrub(path):
            print(f"{path.name}: absolute paths replaced")
        for text in absolute_paths(json.loads(path.read_text(encoding="utf-8"))):
            print(f"{path.name}: {text} is left; add its folder to OTHER_MACHINES")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
