"""A Prometheus on loopback with this project's configuration: `python -m monitoring.local_prometheus`.

Its data lie in a folder of its own, which goes with it. For one that stays, and a Grafana: `docker compose up -d`.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

CONFIGURATION = Path(__file__).parent / "prometheus" / "prometheus.yml"
PORT = 9090
COMPOSE = "docker compose up -d"
_START_LIMIT_S = 20.0
_STOP_LIMIT_S = 20.0


class PrometheusError(RuntimeError):
    """Prometheus is not there or does not start; one sentence with the cause and the mend."""


@dataclass(frozen=True, slots=True)
class Server:
    """A Prometheus that answers at `url`."""

    url: str
    process: subprocess.Popen[bytes]


def program(name: str = "prometheus") -> str:
    """Where the program is. Raises PrometheusError when it is not installed."""
    found = shutil.which(name)
    if found is None:
        raise PrometheusError(
            f"`{name}` is not installed: on Debian and Ubuntu `apt-get install prometheus` brings it, and with Docker"
            f" `{COMPOSE}` brings Prometheus and Grafana"
        )
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(configuration: Path, folder: Path, port: int, more: Sequence[str] = ()) -> Iterator[Server]:
    """Prometheus on 127.0.0.1:`port`, its data and its log in `folder`, ready to be asked; ended at the end.

    Raises PrometheusError, with the end of the log, when it does not start.
    """
    command = [
        program(), f"--config.file={configuration}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn", *more,
    ]  # fmt: skip
    _require_free(port)
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        server = Server(f"http://127.0.0.1:{port}", process)
        _wait_ready(server, log)
        yield server
    finally:
        process.terminate()
        process.wait(_STOP_LIMIT_S)


def _require_free(port: int) -> None:
    """Another server there would answer in our Prometheus' place while that gives up."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        raise PrometheusError(
            f"port {port} of 127.0.0.1 is taken ({error.strerror}); choose another with --port"
        ) from error


def _wait_ready(server: Server, log: Path) -> None:
    deadline_s = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < deadline_s and server.process.poll() is None:
        try:
            with urllib.request.urlopen(f"{server.url}/-/ready", timeout=1):
                break
        except OSError:
            time.sleep(0.05)
    if server.process.poll() is not None or time.monotonic() >= deadline_s:
        said = log.read_text(errors="replace")[-2000:].strip()
        raise PrometheusError(f"Prometheus does not start; mend what it says: {said}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="monitoring.local_prometheus", description=__doc__)
    parser.add_argument("--port", type=int, default=PORT)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="splitwiser-prometheus-") as folder:
            _serve(Path(folder), options.port)
    except PrometheusError as error:
        print(f"splitwiser: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Prometheus has ended, and its data are gone", flush=True)
        return 0
    return 0


def _serve(folder: Path, port: int) -> None:
    """Until it ends or is interrupted."""
    with running(CONFIGURATION, folder, port) as server:
        print(f"Prometheus is at {server.url}, alerts at {server.url}/alerts, what it scrapes at {server.url}/targets")
        print(
            f"Ctrl-C ends it and removes its data. For one that stays, with Grafana's dashboards: {COMPOSE}", flush=True
        )
        server.process.wait()
        raise PrometheusError(f"Prometheus has ended: {(folder / 'prometheus.log').read_text()[-2000:].strip()}")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
