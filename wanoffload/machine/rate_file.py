"""Rates that were measured once, in a file of the user's cache folder, one for each machine."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from wanoffload.machine.hardware import RATES, Hardware

logger = logging.getLogger(__name__)

FORMAT = 1
"""To be raised when what is measured, or how, changes: then old files are of another machine."""

Machine = Mapping[str, str | int]
"""What the rates depend on."""
Rates = dict[str, float]


def known_rates(machine: Machine, refresh: bool, measure: Callable[[], Rates]) -> Rates:
    """What the file of this machine holds; else, or to refresh it, measures and writes it.

    A file that is broken or of another machine is measured anew. A folder that can't be written is
    a warning in the log, once.
    """
    path = rate_file(machine)
    rates = None if refresh else _read(path, machine)
    if rates is None:
        rates = measure()
        _write(path, machine, rates)
    return rates


def rate_file(machine: Machine) -> Path:
    """Where the rates of this machine are, or will be, in the user's cache folder."""
    key = hashlib.sha256(_text(machine).encode()).hexdigest()[:16]
    return _cache_folder() / "wanoffload" / f"rates-{key}.json"


def _cache_folder() -> Path:
    """$XDG_CACHE_HOME, else ~/.cache, as they are now."""
    given = os.environ.get("XDG_CACHE_HOME", "")  # its specification: a relative one is ignored
    return Path(given) if os.path.isabs(given) else Path("/", os.path.expanduser("~"), ".cache")


def _text(machine: Machine) -> str:
    return json.dumps({"format": FORMAT, **machine}, sort_keys=True)


def _read(path: Path, machine: Machine) -> Rates | None:
    try:
        content = json.loads(path.read_text())
        if content["machine"] != json.loads(_text(machine)) or set(content["rates"]) != set(RATES):
            raise ValueError("it is of another machine or version")
        rates = {name: float(rate) for name, rate in content["rates"].items()}
        Hardware(**rates)  # type: ignore[arg-type]  # checks them
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        logger.info("%s can't be used (%s): measuring anew", path, error)
        return None
    return rates


def _write(path: Path, machine: Machine, rates: Rates) -> None:
    """Under another name first, so that nobody reads a part of it."""
    content = {"machine": json.loads(_text(machine)), "rates": rates}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(content, file, indent=1)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        _warn_unwritable(path.parent, str(error))


@cache
def _warn_unwritable(folder: Path, error: str) -> None:
    logger.warning("can't keep this machine's rates in %s (%s): measured each time", folder, error)
