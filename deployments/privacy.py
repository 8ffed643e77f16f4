"""What other users of the machine must not see or reach: files, sockets and ports of a run."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from deployments.config import ConfigError

# For every process of a run: what it makes is its user's alone.
UMASK = 0o077
# Ray binds every port of its own to loopback on systems where clusters are switched off. In a cluster
# (RAY_ADDRESS is set) its nodes must reach each other.
LOOPBACK_ONLY = {} if os.environ.get("RAY_ADDRESS") else {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_TOKEN = Path("~/.ray/auth_token")


def require_own(folder: Path) -> None:
    """Raises ConfigError unless `folder` is a directory of this user; closes it to everybody else."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise ConfigError(f"{folder} is not a folder of yours; ask its owner to remove it")
    if stat.S_IMODE(status.st_mode) & 0o077:
        folder.chmod(0o700)


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
