"""A stand-in for `nvidia-cuda-mps-control`, run as `mps_stand_in.py STATE.json nvidia-cuda-mps-control [-d]`.

It speaks as the real one of driver 580 does: same files, answers and exit statuses. STATE.json is read at every
command, so that a test can change the world in between:

    start      "ok", "refuses" (status 1), "hangs", "dies" (status 0, then nothing), "mute" (runs, answers nothing)
    servers    {"427": {"status": "ACTIVE", "clients": [425], "code": "0"}}; `code` is what terminate_client answers
    servers_after, after   from the `after`-th command on, `servers_after` holds instead
    hangs      commands that are never answered;  fails: commands that end with status 1
    quits      false: `quit` is answered and ignored

Every command is added to STATE.json.commands. The daemon ends by itself when STATE.json is gone, or after a minute.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

ABSENT = "Cannot find MPS control daemon process"


def main(state_file: Path, daemonize: bool) -> int:
    state = json.loads(state_file.read_text())
    pipe = Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
    if daemonize:
        return start(state, state_file, pipe)
    return answer(sys.stdin.readline().split(), state, state_file, pipe)


def start(state: dict[str, Any], state_file: Path, pipe: Path) -> int:
    kind = state.get("start", "ok")
    if kind == "hangs":
        time.sleep(60)
    if kind == "refuses" or daemon_pid(pipe):
        print("An instance of this daemon is already running")
        return 1
    (state_file.with_suffix(".environment")).write_text(json.dumps(dict(os.environ)))
    if os.fork() == 0:
        run_daemon(state_file, pipe, write_pid=kind != "dies")
    deadline = time.monotonic() + 10
    while kind != "dies" and not daemon_pid(pipe) and time.monotonic() < deadline:
        time.sleep(0.005)
    return 0


def run_daemon(state_file: Path, pipe: Path, write_pid: bool) -> None:
    os.setsid()
    for name in ("control", "control_lock", "control_privileged"):
        (pipe / name).touch()
    if write_pid:
        half = pipe / "half"
        half.write_text(f"{os.getpid()}\n")
        half.rename(pipe / "nvidia-cuda-mps-control.pid")
        log = Path(os.environ["CUDA_MPS_LOG_DIRECTORY"])
        (log / "control.log").touch()
        (log / "server.log").touch()
        until = time.monotonic() + 60
        while state_file.exists() and time.monotonic() < until:
            time.sleep(0.1)
    os._exit(0)


def answer(words: list[str], state: dict[str, Any], state_file: Path, pipe: Path) -> int:
    command = " ".join(words)
    with state_file.with_suffix(".commands").open("a") as commands:
        commands.write(command + "\n")
    pid = daemon_pid(pipe)
    if not pid or words[0] in state.get("fails", ()):
        print(ABSENT, file=sys.stderr)
        return 1
    if state.get("start") == "mute" or words[0] in state.get("hangs", ()):
        time.sleep(60)
    if words[0] == "quit":
        return quit_daemon(pid, state, pipe)
    said = reply(words, servers_now(state, state_file))
    print(said, end="\n" if said else "")
    return 0


def servers_now(state: dict[str, Any], state_file: Path) -> dict[str, Any]:
    asked = len(state_file.with_suffix(".commands").read_text().splitlines())
    later = "after" in state and asked > state["after"]
    servers: dict[str, Any] = state.get("servers_after" if later else "servers", {})
    return servers


def reply(words: list[str], servers: dict[str, Any]) -> str:
    if words[0] == "get_server_list":
        return "\n".join(servers)
    server = servers.get(words[1]) if len(words) > 1 else None
    if server is None:
        return f"Server {words[1]} not found" if len(words) > 1 else "Unrecognized command"
    if words[0] == "get_server_status":
        return str(server.get("status", "ACTIVE"))
    if words[0] == "get_client_list":
        return "\n".join(map(str, server.get("clients", ())))
    if words[0] == "terminate_client":
        return str(server.get("code", "0")) if int(words[2]) in server.get("clients", ()) else "201"
    return "Unrecognized command"


def quit_daemon(pid: int, state: dict[str, Any], pipe: Path) -> int:
    if state.get("quits", True):
        os.kill(pid, signal.SIGTERM)
        (pipe / "nvidia-cuda-mps-control.pid").unlink()
    return 0


def daemon_pid(pipe: Path) -> int:
    try:
        pid = int((pipe / "nvidia-cuda-mps-control.pid").read_text())
        return pid if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX" else 0
    except (OSError, ValueError):
        return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), "-d" in sys.argv))
