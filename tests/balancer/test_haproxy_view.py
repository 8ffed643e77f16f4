"""HAProxy's view: which servers its statistics call reachable, asked over a real socket."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from balancer import haproxy_view
from balancer.haproxy_view import ask, server_name, servers_up

HEAD = "# pxname,svname,qcur,status,weight,addr,\n"
STATISTICS = (
    HEAD
    + "http,FRONTEND,,OPEN,,\n"
    + "default,SERVE_REPLICA__default-Replica-a1,0,UP,100,127.0.0.1:30001,\n"
    + "default,SERVE_REPLICA__default-Replica-b2,0,DOWN,100,\n"
    + "default,SERVE_REPLICA__default-Replica-c3,0,no check,100,10.0.0.7:30002,\n"
    + "default,SERVE_REPLICA__default-Replica-d4,0,UP 1/3,100,\n"
    + "default,SERVE_REPLICA__default-Replica-e5,0,MAINT,100,\n"
    + "default,cut_short\n"
    + "default,BACKEND,0,UP,300,\n\n"
)


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """Short, because a socket's path may have 107 bytes only; gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "ctl"


async def asked(socket_path: Path, answer: str | None) -> tuple[dict[str, str], bytes]:
    """What `ask` makes of a HAProxy that answers `answer` (None: nothing, for ever), and what it was asked."""
    questions = []
    finished = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        questions.append(await reader.readline())
        if answer is None:
            await finished.wait()
        else:
            writer.write(answer.encode())
            await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(serve, socket_path)
    try:
        async with server:
            return await ask(socket_path), questions[0]
    finally:
        finished.set()


def test_servers_that_are_up_or_unchecked_are_reachable() -> None:
    """Up, going down and unchecked servers can be reached, at the address that HAProxy uses (if it says); down, in
    maintenance and cut short ones cannot."""
    reachable = {"a1": "127.0.0.1:30001", "c3": "10.0.0.7:30002", "d4": ""}
    assert servers_up(STATISTICS) == {f"SERVE_REPLICA__default-Replica-{one}": at for one, at in reachable.items()}


def test_haproxy_without_servers_reaches_nobody() -> None:
    """Statistics without a server line are an answer: nobody is reachable."""
    assert servers_up(HEAD) == {}


@pytest.mark.parametrize("answer", ["", "Permission denied\n", "Unknown command\n"])
def test_no_statistics_is_no_answer(answer: str) -> None:
    """An empty answer, as of a HAProxy being replaced, is an error and not a view without servers."""
    with pytest.raises(ConnectionError, match="no statistics"):
        servers_up(answer)


def test_the_running_haproxy_is_asked(socket_path: Path) -> None:
    """One question over the administration socket, answered in full."""
    servers, question = asyncio.run(asked(socket_path, STATISTICS))
    assert len(servers) == 3
    assert question == b"show stat\n"


def test_an_absent_haproxy_is_an_os_error(socket_path: Path) -> None:
    """Nobody at the socket: OSError."""
    with pytest.raises(OSError, match=r"."):
        asyncio.run(ask(socket_path))


def test_a_silent_haproxy_is_a_timeout(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody there who does not answer: TimeoutError, which is an OSError too."""
    monkeypatch.setattr(haproxy_view, "_REPLY_LIMIT_S", 0.05)
    with pytest.raises(TimeoutError):
        asyncio.run(asked(socket_path, None))


def test_names_are_those_that_serve_gives() -> None:
    """A replica's server has the name under which Ray Serve writes it into HAProxy's configuration."""
    from ray.serve._private.common import DeploymentID, ReplicaID
    from ray.serve._private.haproxy import HAProxyManager

    for application in ("default", "my app/v1", "ä#b"):
        full = ReplicaID("x1y2", DeploymentID("Replica", application)).to_full_id_str()
        assert server_name(full) == HAProxyManager.get_safe_name(full)
