"""What other users of the machine must not see or reach: files, sockets and ports of a run."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from deployments.config import ConfigError

# For every process of a run: what it makes is its user's alone.
UMASK = 0o077
# Ray binds every port of its own to loopback on systems where clusters are switched off, and an engine of one process
# needs no other interface. In a cluster (RAY_ADDRESS is set) the nodes must reach each other.
_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
LOOPBACK_ONLY = (
    {} if os.environ.get("RAY_ADDRESS") else {_VARIABLE: "0", "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
)
_TOKEN = Path("~/.ray/auth_token")


def require_own(folder: Path) -> None:
    """Raises ConfigError unless `folder` is a directory of this user; closes it to everybody else."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise ConfigError(f"{folder} is not a folder of yours; ask its owner to remove it")
    if stat.S_IMODE(status.st_mode) & 0o077:
        folder.chmod(0o700)


def behind_haproxy(config_path: Path, folder: Path) -> Path:
    """The configuration for Serve, which would let its replicas listen where only HAProxy should.

    In a cluster HAProxy must reach the replicas of other nodes, and the configuration stays what it is.
    """
    document = yaml.safe_load(config_path.read_text())
    if os.environ.get("RAY_ADDRESS") or document.get("http_options", {}).get("host") is None:
        return config_path
    document["http_options"]["host"] = "127.0.0.1"
    served = folder / "served.yaml"
    served.write_text(yaml.safe_dump(document))
    return served


def keep_grpc_on_loopback() -> None:
    """For a deployment's constructor: Serve (2.60) is about to open the replica's port for handles to all interfaces.

    Ray's token guards that port too; this is for what comes before the token is looked at.
    """
    from ray.serve._private import replica

    bind: Callable[[Any, str], int] = replica.add_port_to_grpc_server
    if os.environ.get(_VARIABLE) == "0":
        replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", "127.0.0.1"))


def close_session(driver_pid: int) -> None:
    """Close the Ray session of this driver, which Ray makes writable for everybody, and Ray's own token beside it.

    To be called again and again while the system starts; it does nothing when all is closed.
    """
    for folder in _ray_folder().glob(f"session_*_{driver_pid}"):
        _close(folder, 0o700)
    token = _TOKEN.expanduser()
    if token.exists():
        _close(token, 0o600)


def _ray_folder() -> Path:
    return Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray"


def _close(path: Path, mode: int) -> None:
    status = path.lstat()
    if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) != mode:
        path.chmod(mode)
