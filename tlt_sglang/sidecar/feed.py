"""From the harvest logs of a store's engines to the sidecar's buffer.

Responses are taken while they grow, too: those of the long tail end when the rollout does, and then
the target changes.

It opens the log of every announced engine, and again when an engine returns; that of an engine on
another machine through the exporter there. It takes only records
of the target version that the engine has announced: a newer version cannot be trained on before its
embedding and head are published, and an older one has left the buffer.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.exporter.messages import Export, exports
from tlt_sglang.exporter.remote import RemoteReader
from tlt_sglang.harvest import announce
from tlt_sglang.harvest.announce import Announcement
from tlt_sglang.harvest.assemble import Assembler, LoggedSequence
from tlt_sglang.harvest.reader import Reader
from tlt_sglang.harvest.sequence import TokenSequence
from tlt_sglang.sidecar.buffer import Buffer

QUIET_SECONDS = 2.0
"""Time without new records after which unfinished requests are taken as they are."""
GROWN_SECONDS = 2.0
"""Time between two looks at responses that grow."""
GROWN_TOKENS = 128
"""Tokens by which a response has grown when it is taken once more."""
LOOK_SECONDS = 1.0
"""Time between two looks at the announcements."""
AT_ONCE = 256
"""Records of one engine that are read before those of the next one."""


@dataclass
class _Source:
    reader: Reader | RemoteReader
    assembler: Assembler
    version: int
    last_record: float
    dirty: bool = field(default=False)
    """True if records have arrived since the last flush."""


class Feed:
    """Reads the logs of a store's engines into `buffer`.

    `hidden_size` is the target's, `features` the hidden states that a drafter reads per token.
    """

    def __init__(
        self,
        store: Path,
        buffer: Buffer,
        hidden_size: int,
        features: int,
        *,
        assembled: int,
        key: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`assembled` is the most bytes of unfinished requests to hold, of all engines.

        `key` is the exporters' CURVE key. Raises ConfigError where it cannot be used.
        """
        self.buffer = buffer
        self.engines: list[Announcement] = []
        self.rl_step = 0
        """RL step that new sequences belong to."""
        self._store, self._assembled, self._key, self._clock = store, assembled, key, clock
        self._features = hidden_size * features
        self._width = self._features + (hidden_size if features > 1 else 0)
        self._sources: dict[str, _Source] = {}
        self._looked = self._taken_growing = float("-inf")

    def pump(self) -> int:
        """Read new records into the buffer; return their number. Never waits."""
        now = self._clock()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._look(now)
        takes_growing = now - self._taken_growing >= GROWN_SECONDS
        if takes_growing:
            self._taken_growing = now
        read = 0
        for path, source in list(self._sources.items()):
            records = source.reader.read(AT_ONCE)
            read += len(records)
            for record in records:
                self._take(source, source.assembler.add(record))
            if takes_growing:
                self._take(source, source.assembler.grown(GROWN_TOKENS))
            if records:
                source.last_record, source.dirty = now, True
            elif source.dirty and now - source.last_record > QUIET_SECONDS:
                self._take(source, source.assembler.flush())
                source.dirty = False
            elif source.reader.ended:
                self._end(path)
        return read

    def status(self) -> dict[str, int]:
        """Return the number of engines, and of their records that could not be read."""
        return {
            "engines": len(self._sources),
            "remote": sum(isinstance(s.reader, RemoteReader) for s in self._sources.values()),
            "overwritten": sum(source.reader.overwritten for source in self._sources.values()),
            "torn": sum(source.reader.torn for source in self._sources.values()),
        }

    def close(self) -> None:
        """Close all logs."""
        for source in self._sources.values():
            source.reader.close()
        self._sources.clear()

    def _end(self, path: str) -> None:
        """Take what is there of a log that has ended, and close it."""
        source = self._sources.pop(path)
        self._take(source, source.assembler.flush())
        source.reader.close()

    def _look(self, now: float) -> None:
        self.engines = announce.read(self._store)
        announced = {engine.harvest for engine in self.engines}
        served = {path: export for export in exports(self._store) for path in export.logs}
        for path, source in list(self._sources.items()):
            remote = source.reader
            if not isinstance(remote, RemoteReader):
                continue
            # If the exporter has ended with the engine, nobody says that the log has ended.
            if path not in announced:
                self._end(path)
            elif path in served and served[path].address != remote.address:
                remote.move(served[path].address)
        for engine in self.engines:
            if engine.harvest in self._sources:
                self._sources[engine.harvest].version = engine.target_version
                continue
            reader = self._open(engine.harvest, served.get(engine.harvest))
            if reader is None:
                continue  # the engine has just ended, or is not ready yet
            if reader.geometry.feature_size != self._width:
                reader.close()
                continue
            self._sources[engine.harvest] = _Source(
                reader, Assembler(self._assembled), engine.target_version, now
            )
        for source in self._sources.values():
            source.assembler.most_bytes = self._assembled // len(self._sources)

    def _open(self, path: str, export: Export | None) -> Reader | RemoteReader | None:
        """Return a reader of a log on this machine or of an exporter's, None if there is none."""
        if Path(path).exists():
            with contextlib.suppress(EnvironmentProblem):
                return Reader.open(Path(path))
            return None
        if export is None:
            return None
        return RemoteReader(export.address, path, export.logs[path], self._key)

    def _take(self, source: _Source, sequences: list[LoggedSequence]) -> None:
        for sequence in sequences:
            if sequence.target_version != source.version:
                continue
            # The log holds the bits of bfloat16, which numpy does not have: [features | last].
            wide = torch.from_numpy(sequence.features.view(np.int16)).view(torch.bfloat16)
            self.buffer.add(
                TokenSequence(
                    torch.from_numpy(sequence.ids.astype(np.int64)),
                    wide[:, : self._features],
                    sequence.prompt_length,
                    wide[:, self._features :] if self._width > self._features else None,
                    sequence.request,
                    sequence.start,
                    sequence.target_version,
                    self.rl_step,
                    sequence.ended,
                )
            )
