"""How the parts of a batch reach replicas: a place from the router, then straight to the replica's own port, with the
ticket as a header. What HAProxy does for every request, so the policy places each part; without the hop."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

import aiohttp

from balancer import hint
from balancer.batches import COMPLETIONS
from balancer.ticket import HEADER, ROUTER_HEADER, Ticket
from deployments.middleware import Scope

_CONNECT_S = 5.0
# What a part takes along of its batch's headers. Not the session: it would bring every part to the same replica.
_TAKEN_ALONG = ("authorization", "traceparent", "tracestate", *hint.CLIENT_HEADERS.values())
_LEFT_BEHIND = (hint.SESSION, hint.CLIENT_HEADERS["explain"])
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class RouterGoneError(ConnectionError):
    """The router did not answer, or not with a place."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part may go: a replica, its address, and the headers that let it in."""

    replica_id: str
    address: str
    headers: Mapping[str, str]

    @property
    def ticket(self) -> Ticket:
        """A ticket with another status than 200 is the router's refusal."""
        return Ticket.decode(self.headers[HEADER])


class Way:
    """The way of one batch's parts, by the router that sent the batch here."""

    def __init__(self, client: aiohttp.ClientSession, router: str, headers: Mapping[str, str]) -> None:
        self._client = client
        self._router = router
        self._headers = {name: headers[name] for name in _TAKEN_ALONG if name in headers and name not in _LEFT_BEHIND}
        asked = {short: headers.get(name, "") for short, name in hint.CLIENT_HEADERS.items() if name in self._headers}
        self._hint = urlencode({"part": "1", "path": COMPLETIONS, **asked})

    async def place(self, body: bytes) -> Place:
        """Ask the router; waits as long as the router lets the part wait. Raises RouterGoneError."""
        headers = {hint.HEADER: self._hint, "content-type": "application/json"}
        try:
            async with self._client.post(f"http://{self._router}/internal/route", data=body, headers=headers) as answer:
                if answer.status != 200:
                    raise RouterGoneError(f"the router answered {answer.status}")
                named = json.loads(await answer.read())
                place = Place(named["replica_id"], named.get("address", ""), named["request_headers"])
                if place.ticket.status == 200 and not place.address:
                    raise RouterGoneError("the router does not know the replica's address yet")
                return place
        except (aiohttp.ClientError, OSError, ValueError, KeyError) as error:
            raise (
                error if isinstance(error, RouterGoneError) else RouterGoneError(f"the router is gone ({error})")
            ) from error

    @contextlib.asynccontextmanager
    async def send(self, place: Place, body: bytes, request_id: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """The replica's answer. Raises aiohttp.ClientError or OSError; leaving early hangs up on the replica."""
        headers = {
            **self._headers, **place.headers, "content-type": "application/json", "x-request-id": request_id,
        }  # fmt: skip
        async with self._client.post(f"http://{place.address}{COMPLETIONS}", data=body, headers=headers) as answer:
            yield answer


def open_client() -> aiohttp.ClientSession:
    """Without limits of time or number: how long an answer takes and how many are under way is decided elsewhere."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
    # A connection kept alive may be closed by the other side just as a part is sent, which looks like a lost part.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(timeout=timeout, connector=connector)


def router_address(scope: Scope) -> str:
    """The router that HAProxy asked, if it is on this machine: nobody else may send this replica anywhere."""
    address = header(scope, ROUTER_HEADER)
    own = (scope.get("server") or ("", None))[0]
    return address if address.rpartition(":")[0] in (*_LOOPBACK, own) else ""


def header(scope: Scope, name: str) -> str:
    """A header's value, "" when it is not there."""
    wanted = name.encode()
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == wanted), "")
