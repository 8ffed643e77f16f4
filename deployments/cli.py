"""The command `splitwiser`."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path

from balancer.access import NO_LIMITS, digest, parse_keys
from balancer.board import BoardError, board_path
from deployments.config import ConfigError, load


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; what a person can mend is printed as one sentence, and the exit status is 2."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except (ConfigError, BoardError) as error:
        print(f"splitwiser: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="splitwiser", description="Several vLLM engines on one GPU behind one router")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="check FILE, run it with `serve run`, and clean up at the end")
    _file(serve)
    serve.add_argument("--plain", action="store_true", help="use Serve's own Python proxy instead of HAProxy")
    serve.set_defaults(command=_serve)
    validate = commands.add_parser("validate", help="check FILE and start nothing")
    _file(validate)
    validate.set_defaults(command=_validate)
    plan = commands.add_parser("plan", help="print the memory plan of FILE, start nothing; status 1 if it cannot hold")
    _file(plan)
    plan.add_argument("--card", help="plan for this card instead of the GPUs here: a name such as A10, or 24GiB")
    plan.set_defaults(command=_plan)
    doctor = commands.add_parser("doctor", help="say what this machine lacks for serving FILE; status 1 if anything")
    _file(doctor)
    doctor.set_defaults(command=_doctor)
    restart = commands.add_parser("restart", help="drain and replace one replica of the run that is going on")
    restart.add_argument("slot", type=int, help="its slot, as `splitwiser top` shows it")
    restart.set_defaults(command=_restart)
    change = commands.add_parser("apply", help="bring FILE's `balancer` section into force in the run that is going on")
    _file(change)
    change.add_argument(
        "--run", metavar="NAME", help="a run's folder name, where several go on (default: the youngest)"
    )
    change.set_defaults(command=_apply)
    # No prefix characters: whatever follows belongs to the bench, its options and --help too.
    bench = commands.add_parser("bench", help="the experiments of Splitwiser here", add_help=False, prefix_chars="\0")
    bench.add_argument("words", nargs="*")
    bench.set_defaults(command=_bench)
    decisions = commands.add_parser("decisions", help="the router's last decisions and what they were made from")
    decisions.set_defaults(command=_decisions)
    key = commands.add_parser("key", help="make an API key for NAME: the line for the file of keys, and the key itself")
    key.add_argument("name", metavar="NAME")
    key.set_defaults(command=_key)
    commands.add_parser("top", help="watch GPU and replicas of the run that is going on").set_defaults(command=_top)
    status = commands.add_parser("status", help="the same once, as JSON")
    status.add_argument("--json", action="store_true", help="which it always is")
    status.set_defaults(command=_status)
    return parser


def _file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", type=Path, default=Path("serve_config.yaml"), metavar="FILE")


def _serve(options: argparse.Namespace) -> int:
    from deployments.launch import serve

    return serve(options.file, options.plain)


def _bench(options: argparse.Namespace) -> int:
    """Becomes `python -m benchmarks.bench`: nothing here imports what measures it, and Ctrl-C reaches it directly."""
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.bench", *options.words])


def _validate(options: argparse.Namespace) -> int:
    from deployments import entrance

    args, _ = load(options.file)
    entrance.access(args.access, time.monotonic)
    print(f"{options.file} is fine: {args.replicas} replicas of {args.public_name}, policy {args.balancer.policy}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from deployments.plan_command import show_plan

    return show_plan(options.file, options.card)


def _doctor(options: argparse.Namespace) -> int:
    from deployments.doctor import doctor

    return doctor(*load(options.file))


def _restart(options: argparse.Namespace) -> int:
    from deployments.restart_command import restart

    return restart(newest_board(), options.slot)


def _apply(options: argparse.Namespace) -> int:
    from deployments import live

    folder = _newest_run(options.run)
    live.deploy(live.changed_document(options.file, folder), folder)
    print(f"the balancer of {options.file} is in force")
    return 0


def _decisions(options: argparse.Namespace) -> int:
    from deployments.live import decisions

    for decision in decisions(_newest_run()):
        print(json.dumps(decision))
    return 0


def _key(options: argparse.Namespace) -> int:
    secret = f"sk-{secrets.token_urlsafe(32)}"
    line = f"{options.name} sha256:{digest(secret).hex()}"
    try:
        parse_keys(line, NO_LIMITS)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    print(line)
    print(f"splitwiser: the key of {options.name}, which is shown only now, is {secret}", file=sys.stderr)
    return 0


def _top(options: argparse.Namespace) -> int:
    from monitoring.top import top

    top(newest_board(), interval_s=1.0)
    return 0


def _status(options: argparse.Namespace) -> int:
    from monitoring.top import status

    print(json.dumps(status(newest_board()), indent=2))
    return 0


def newest_board() -> Path:
    """The board of the youngest run of this user, or of a bare `serve run`."""
    return board_path(_newest_run().name if _living() else "default")


def _newest_run(name: str | None = None) -> Path:
    """The folder of the run `name`, or of the youngest of this user. Raises ConfigError when there is none."""
    folders = _living()
    found = max((f for f in folders if name in (None, f.name)), key=lambda folder: folder.stat().st_mtime, default=None)
    if found is None:
        going_on = ", ".join(sorted(f.name for f in folders)) or "none"
        raise ConfigError(f"no such run goes on (going on: {going_on}); start one with `splitwiser serve FILE`")
    return found


def _living() -> list[Path]:
    from deployments.processes import run_alive, runs_folder

    return [folder for folder in runs_folder().glob("*-*") if run_alive(folder.name)]


if __name__ == "__main__":
    sys.exit(main())
