"""Start the system as a user does, for a benchmark, and stop it again."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.ports import free_port

START_LIMIT_S = 600


@contextlib.contextmanager
def serving(application: Mapping[str, Any], flags: Sequence[str] = (), limit_s: float = START_LIMIT_S) -> Iterator[str]:
    """`splitwiser serve` with one application on a free port; yields its URL once ready.

    Raises RuntimeError with the end of its log when it does not start within `limit_s`.
    """
    port = free_port()
    application = {**application, "args": {**application["args"], "monitoring": {"exporter_port": None}}}
    document = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [{"name": "default", "route_prefix": "/", **application}],
    }
    with tempfile.TemporaryDirectory() as folder:
        config, log = Path(folder) / "serve_config.yaml", Path(folder) / "log"
        config.write_text(yaml.safe_dump(document))
        command = [sys.executable, "-m", "deployments.cli", "serve", str(config), *flags]
        with log.open("w") as output:
            child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_ready(child, log, limit_s)
            yield f"http://127.0.0.1:{port}"
        finally:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                child.kill()
                raise


def _wait_ready(child: subprocess.Popen[bytes], log: Path, limit_s: float) -> None:
    deadline_s = time.monotonic() + limit_s
    while "splitwiser: ready" not in log.read_text():
        if child.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(f"the system did not start: ...{log.read_text()[-2000:]}")
        time.sleep(0.2)
