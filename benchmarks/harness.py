"""Rows, the file they are stored in, and how numbers are summed up.

A *row* is one measured thing: a case, a key that says which, a fingerprint of the code that was
measured, and values. A row is written as soon as it is measured, one JSON object a line, so a run
that was stopped goes on where it ended: a verified row with the same case, key and fingerprint is
not measured again.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

Key = Mapping[str, "str | int | bool"]

ROOT = Path(__file__).resolve().parent.parent
CODE = ("wanoffload/**/*.py", "wanoffload/*.pyi", "kernels/*.py", "csrc/**/*.h", "csrc/**/*.cpp")
STARTED = time.perf_counter()


def say(text: str) -> None:
    """Prints one line with the seconds since the start, at once: runs are watched and cut off."""
    print(f"[{elapsed():7.1f} s] {text}", file=sys.stderr, flush=True)


def elapsed() -> float:
    """Seconds since the harness was imported."""
    return time.perf_counter() - STARTED


@dataclass(frozen=True)
class Spread:
    """A median with the least and the greatest of what was seen."""

    median: float
    min: float
    max: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Sums up ``values``; at least one is needed."""
        if not values:
            raise ValueError("a spread needs at least one value")
        return cls(statistics.median(values), min(values), max(values), len(values))

    def as_json(self) -> dict[str, float | int]:
        """The same as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Row:
    """One measured thing. ``values["verified"]`` says whether its output was right."""

    case: str
    key: dict[str, Any]
    fingerprint: str
    values: dict[str, Any]
    machine: str
    when: str

    def __post_init__(self) -> None:
        if not isinstance(self.values.get("verified"), bool):
            raise ValueError("every row says whether its output was verified")

    @property
    def verified(self) -> bool:
        """Whether the output was compared and found right."""
        return bool(self.values["verified"])

    def matches(self, case: str, key: Key) -> bool:
        """Whether this row is about ``case`` and ``key``."""
        return self.case == case and self.key == dict(key)


class ResultStore:
    """The rows of one file. Adding writes at once; a line cut off by a kill is passed over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows = list(_read_rows(path))

    def rows(self, case: str | None = None) -> list[Row]:
        """All rows in the order they were measured, or those of one case."""
        return [row for row in self._rows if case in (None, row.case)]

    def newest(self, case: str) -> list[Row]:
        """For each key of ``case`` the row measured last, in the order the keys appeared."""
        latest: dict[str, Row] = {}
        for row in self.rows(case):
            latest[json.dumps([row.machine, row.key], sort_keys=True)] = row
        return list(latest.values())

    def find(self, case: str, key: Key, fingerprint: str, machine: str) -> Row | None:
        """The newest verified row with this key, fingerprint and machine, if there is one."""
        for row in reversed(self._rows):
            same_code = row.fingerprint == fingerprint and row.machine == machine
            if row.matches(case, key) and same_code and row.verified:
                return row
        return None

    def add(self, row: Row) -> None:
        """Appends a row to the file and forces it out."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._line_end() + json.dumps(asdict(row)) + "\n")
        self._rows.append(row)

    def _line_end(self) -> str:
        """A line end, if the file stops within a line."""
        text = self.path.read_bytes()
        return "\n" if text and not text.endswith(b"\n") else ""


def _read_rows(path: Path) -> Iterator[Row]:
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            yield Row(**json.loads(line))
        except (ValueError, TypeError) as error:
            say(f"{path}:{number} is not a row and is passed over: {error}")


@dataclass
class Session:
    """What every case is given: the store, the options, the device and the running totals."""

    store: ResultStore
    options: Namespace
    device: torch.device
    machine: str
    failures: list[str] = field(default_factory=list)
    stopped: bool = False  # at the deadline

    def find(self, case: str, key: Key, fingerprint: str) -> Row | None:
        """The stored row that makes a new measurement needless, or None."""
        return self.store.find(case, key, fingerprint, self.machine)

    def missing(self, case: str, key: Key, fingerprint: str) -> bool:
        """Whether a row has to be measured: asked for again, or not there yet."""
        if self.options.again or self.find(case, key, fingerprint) is None:
            return True
        say(f"{case} {brief(key)}: already measured")
        return False

    def chosen_parts(self, parts: Iterable[str]) -> list[str]:
        """Of a case's parts those that ``--parts`` names, in the case's order; all without it."""
        return [part for part in parts if part in (self.options.parts or (part,))]

    def out_of_time(self) -> bool:
        """Whether ``--deadline`` has passed, so that no further row is begun."""
        deadline = self.options.deadline
        if deadline is None or elapsed() < deadline:
            return False
        self.stopped = True
        self.failures.append(f"stopped at the deadline of {deadline:g} s; run again to go on")
        return True

    def record(self, case: str, key: Key, fingerprint: str, values: Mapping[str, Any]) -> Row:
        """Stores a row and tells the watcher; an unverified one makes the run fail."""
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        row = Row(case, dict(key), fingerprint, dict(values), self.machine, when)
        self.store.add(row)
        if not row.verified:
            self.failures.append(f"{case} {brief(key)}: the row is not verified")
        return row


def brief(key: Key) -> str:
    """A key in one line."""
    return " ".join(f"{name}={value}" for name, value in key.items())


def code_fingerprint(label: str | None = None) -> str:
    """Names the measured code: ``label`` where given, else a hash of the package's sources."""
    if label is not None:
        return label
    digest = hashlib.sha256()
    for path in sorted(_sources()):
        digest.update(str(path.relative_to(ROOT)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _sources() -> Iterable[Path]:
    return {path for pattern in CODE for path in ROOT.glob(pattern)}


def peer_fingerprint() -> str:
    """Names the code of what is compared with: the versions of torch and diffusers."""
    from importlib.metadata import version

    return f"torch {torch.__version__}, diffusers {version('diffusers')}"
