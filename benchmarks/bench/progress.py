"""A line for everything that happens and, on a terminal, a bar."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.bench.plan import Plan
from benchmarks.bench.rows import Json


class Bar:
    """Counts rounds, run or skipped. Where standard error is no terminal only the lines are written."""

    def __init__(self, console: Console, plan: Plan) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._console = console
        self._task = self._progress.add_task("rounds", total=sum(len(rounds) for rounds in plan.stages.values()))

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._progress.update(self._task, description=text)
        self._console.print(escape(text), highlight=False)

    def done(self, row: Json) -> None:
        if row["kind"] == "round" or "repeat" in row:
            self._progress.advance(self._task)
        self._console.print(escape(line(row)), highlight=False, soft_wrap=True)


def line(row: Json) -> str:
    """A row in one line."""
    match row["kind"]:
        case "round":
            failed = f", {row['failed']} failed" if row["failed"] else ""
            rates = f"{row['output_tokens_per_s']:.0f} tokens/s, steady {row['steady_tokens_per_s']:.0f}{failed}"
            return f"{_cell(row)} #{row['repeat'] + 1}: {row['wall_s']:.2f} s, {rates}"
        case "start":
            return f"stage '{row['stage']}' ready after {row['start_s']:.0f} s"
        case "skip":
            return f"skipped {_cell(row)}: {row['reason']}"
        case "failure":
            what, _, log = row["error"].partition("; its log ends: ")
            return f"failed, stage '{row['stage']}': {what} ...{log[-200:]}"
        case kind:
            return f"{kind} {row['run']}"


def _cell(row: Json) -> str:
    return f"{row['system']} x{row['processes']}, {row['workload']}"
