"""Where API keys come from: a file that is read again when it changes, and the environment, which is read once."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

from balancer.access import Key, Keys, Limits, digest, parse_keys

logger = logging.getLogger(__name__)

VARIABLE = "SPLITWISER_API_KEYS"
# Where a run's own parts find the key with which they ask the public address; the launcher makes one for each run.
INTERNAL_VARIABLE = "SPLITWISER_INTERNAL_KEY"
# How long a revoked key may still be good.
_LOOK_EVERY_S = 1.0


class KeyFileError(ValueError):
    """The keys cannot be used; one sentence with the mend, without any secret."""


def read(path: Path, defaults: Limits) -> Keys:
    """The keys in a file that nobody but its owner may read. Raises KeyFileError."""
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"cannot read the API keys in {path} ({error}); name a readable text file") from None
    if stat.S_IMODE(mode) & 0o077:
        raise KeyFileError(f"others may read the API keys in {path}; run `chmod 600 {path}`")
    return _parsed(text, defaults, str(path))


def _parsed(text: str, defaults: Limits, where: str) -> Keys:
    try:
        keys = parse_keys(text, defaults)
    except ValueError as error:
        raise KeyFileError(f"{where}: {error}") from None
    if not keys:
        raise KeyFileError(f"{where} holds no API key, so that nobody could enter; add one, or leave the setting out")
    return keys


def internal_key() -> str | None:
    """The key of this run's own parts, which no limit holds for; None where the launcher did not start them."""
    return os.environ.get(INTERNAL_VARIABLE)


class KeySource:
    """The keys of now. Call it; None when neither a file nor the environment names any.

    A file that became unreadable or wrong is reported and changes nothing: the keys read before stay good.
    Raises KeyFileError when the very first reading fails.
    """

    def __init__(self, path: Path | None, defaults: Limits, clock: Callable[[], float]) -> None:
        self._path = path
        self._defaults = defaults
        self._clock = clock
        text = os.environ.get(VARIABLE)
        self._fixed: Keys = _parsed(text, defaults, f"${VARIABLE}") if text else ()
        self._looked_s = clock()
        self._version = self._version_now()
        self._keys = self._read()

    def __call__(self) -> Keys | None:
        if self._path is not None and self._clock() - self._looked_s >= _LOOK_EVERY_S:
            self._looked_s = self._clock()
            self._look()
        return self._keys

    def _look(self) -> None:
        if (version := self._version_now()) == self._version:
            return
        self._version = version
        try:
            self._keys = self._read()
        except KeyFileError as error:
            logger.warning("%s; the keys read before stay valid", error)
        else:
            logger.warning("the API keys in %s were read again", self._path)

    def _read(self) -> Keys | None:
        keys = self._fixed if self._path is None else read(self._path, self._defaults) + self._fixed
        own = internal_key()
        return (*keys, Key("splitwiser itself", digest(own))) if keys and own else keys or None

    def _version_now(self) -> tuple[int, int, int] | None:
        if self._path is None:
            return None
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_ctime_ns, status.st_size
