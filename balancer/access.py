"""Who may ask, and how much: API keys, and for each key its rates and its requests at once.

Pure: the keys come from a function (`balancer.key_file`), the time from a clock. A key is known by its SHA-256 alone,
and the digests of all keys are compared, each in constant time, so that an answer's time tells nothing about them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from balancer.readings import Decision, reject

SHORTEST_SECRET = 16
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)
_MINUTE_S = 60.0
# A key that asks for more at once than it may has to wait for an answer of its own: nobody knows how long.
_CONCURRENT_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one key may use; None is no limit. Tokens are the predicted ones, prompt and output together."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    concurrent: int | None = None

    def shared_by(self, parts: int) -> Limits:
        """The part of each of `parts` doors that count for themselves."""
        return Limits(
            self.requests_per_minute and self.requests_per_minute / parts,
            self.tokens_per_minute and self.tokens_per_minute / parts,
            self.concurrent and math.ceil(self.concurrent / parts),
        )


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Key:
    """One holder of a key. `digest` is the secret's SHA-256."""

    name: str
    digest: bytes = field(repr=False)
    limits: Limits = NO_LIMITS


Keys = tuple[Key, ...]
# Without keys everybody is this one, and so are the system's own parts.
ANYONE = Key("", b"")


def digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def parse_keys(text: str, defaults: Limits) -> Keys:
    """Entries `NAME SECRET [limit=number ...]`, one a line or between semicolons; `#` begins a comment.

    SECRET is the key itself or `sha256:` and its digest in hexadecimal. Raises ValueError, in words without the secret.
    """
    keys: dict[str, Key] = {}
    for number, line in enumerate(re.split(r"[\n;]", text), 1):
        if words := line.split("#")[0].split():
            key = _key(words, defaults, f"entry {number}")
            if key.name in keys:
                raise ValueError(f"entry {number} names `{key.name}` a second time")
            keys[key.name] = key
    return tuple(keys.values())


def _key(words: list[str], defaults: Limits, where: str) -> Key:
    if len(words) < 2 or not _NAME.fullmatch(words[0]):
        raise ValueError(f"{where} is not `NAME SECRET`, with a name of letters, digits and . _ @ -")
    name, secret, *limits = words
    hashed = _DIGEST.fullmatch(secret)
    if not hashed and (len(secret) < SHORTEST_SECRET or secret.startswith("sha256:")):
        raise ValueError(f"the secret of `{name}` is neither {SHORTEST_SECRET} characters or more nor a SHA-256 digest")
    return Key(name, bytes.fromhex(hashed[1]) if hashed else digest(secret), _limits(limits, defaults, name))


def _limits(words: list[str], defaults: Limits, name: str) -> Limits:
    known = {f.name for f in dataclasses.fields(Limits)}
    changed: dict[str, int] = {}
    for word in words:
        limit, _, text = word.partition("=")
        if limit not in known or not re.fullmatch(r"[1-9]\d{0,11}", text):
            raise ValueError(f"`{word}` of `{name}` is not a limit; write {', '.join(sorted(known))} =number")
        changed[limit] = int(text)
    return dataclasses.replace(defaults, **changed)


def presented(authorization: str, api_key: str = "") -> str:
    """The secret in `Authorization: Bearer ...`, or else in `x-api-key`; empty when there is none."""
    scheme, _, secret = authorization.strip().partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else api_key.strip()


class TokenBucket:
    """Holds a minute's worth; what is dearer than the whole bucket passes when it is full, and leaves it in debt."""

    def __init__(self, per_minute: float, now_s: float) -> None:
        self._per_minute = self._level = per_minute
        self._at_s = now_s

    def wait_s(self, cost: float, now_s: float) -> float:
        """Seconds until `cost` may be taken; 0 when it may be taken now."""
        self._level = min(self._per_minute, self._level + (now_s - self._at_s) * self._per_minute / _MINUTE_S)
        self._at_s = now_s
        return max(0.0, min(cost, self._per_minute) - self._level) * _MINUTE_S / self._per_minute

    def take(self, cost: float) -> None:
        self._level -= cost


class Meter:
    """One key's buckets, with the share in its limits of one of so many doors."""

    def __init__(self, limits: Limits, doors: int, now_s: float) -> None:
        self.limits = limits
        share = limits.shared_by(doors)
        self._concurrent = share.concurrent
        self._requests = share.requests_per_minute and TokenBucket(share.requests_per_minute, now_s)
        self._tokens = share.tokens_per_minute and TokenBucket(share.tokens_per_minute, now_s)

    def admit(self, tokens: int, concurrent: int, now_s: float) -> Decision | None:
        """Take one request of `tokens`, `concurrent` counting it; or the refusal, which takes nothing."""
        if self._concurrent is not None and concurrent > self._concurrent:
            return reject(429, "too_many_at_once", _CONCURRENT_RETRY_S)
        if self._requests and (wait_s := self._requests.wait_s(1.0, now_s)):
            return reject(429, "request_rate", wait_s)
        if self._tokens and (wait_s := self._tokens.wait_s(tokens, now_s)):
            return reject(429, "token_rate", wait_s)
        if self._requests:
            self._requests.take(1.0)
        if self._tokens:
            self._tokens.take(tokens)
        return None


class Access:
    """The keys of one door and what each has used. Without keys everybody is one holder, with the default limits.

    Of `doors` doors that count for themselves, each lets in its share.
    """

    def __init__(
        self, keys: Callable[[], Keys | None], clock: Callable[[], float], defaults: Limits = Limits(), doors: int = 1
    ) -> None:
        self._keys = keys
        self._clock = clock
        self._doors = doors
        self._anyone = dataclasses.replace(ANYONE, limits=defaults)
        self._meters: dict[str, Meter] = {}

    def holder(self, secret: str) -> Key | None:
        """Whose key this is; None when it is nobody's. Without keys everybody may enter."""
        keys = self._keys()
        if keys is None:
            return self._anyone
        shown, found = digest(secret), None
        for key in keys:
            if hmac.compare_digest(key.digest, shown):
                found = key
        return found

    def admit(self, key: Key, tokens: int, concurrent: int = 0) -> Decision | None:
        """Charge `key` for one request; the refusal when it has used up what it may."""
        now_s = self._clock()
        meter = self._meters.get(key.name)
        if meter is None or meter.limits != key.limits:
            meter = self._meters[key.name] = Meter(key.limits, self._doors, now_s)
        return meter.admit(tokens, concurrent, now_s)


def refusal_of_strangers() -> Decision:
    """The answer to a request without a valid key."""
    return reject(401, "invalid_api_key", 0.0)
