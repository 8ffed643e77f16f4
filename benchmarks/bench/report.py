"""Writes a run's report: one HTML page that links to its PNG files. It is made from the rows alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from benchmarks.bench import summary
from benchmarks.bench.rows import Json

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1250px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .6em 0 1.6em; font-size: 12.5px }
th, td { border: 1px solid #ccc; padding: .25em .6em; text-align: right; vertical-align: top }
td:first-child, th:first-child, table.words td { text-align: left }
th { background: #f3f3f3 }
img { max-width: 100% }
pre { background: #f6f6f6; padding: .6em; overflow-x: auto; white-space: pre-wrap }
"""
_HOW = (
    "Medians of the runs, least and greatest in brackets. A phase lasts while any request is in it, so with mixed "
    "batching or several processes both run at once. Saved: against one process of the same software (hf-sequential, "
    "vllm-single). Steady: output tokens in the middle half of a run. SM: without a GPU the CPUs' utilization. "
    "docs/bench.md says how each column is measured."
)


def write_report(rows: Sequence[Json], folder: Path) -> Path:
    """report.html and its plots in `folder`; without matplotlib the page says so and has its tables only."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = summary.summaries(rows)
    try:
        from benchmarks.bench.plots import draw

        plots, note = draw(cells, folder), ""
    except ImportError:
        plots, note = [], "Without plots: matplotlib is not installed here (the extra `bench`)."
    page = folder / "report.html"
    page.write_text(html(rows, plots, note))
    return page


def html(rows: Sequence[Json], plots: Iterable[tuple[str, str]], note: str = "") -> str:
    cells = summary.summaries(rows)
    parts = ["<h1>Splitwiser's experiments</h1>", _runs(rows), f"<p>{_HOW} {escape(note)}</p>"]
    parts += [f'<h2>{escape(text)}</h2><img src="{escape(name)}" alt="{escape(text)}">' for name, text in plots]
    parts += [_workload(name, cells) for name in summary.workloads(cells.values())]
    if skipped := summary.skip_table(rows):
        parts += ["<h2>Not run, and why</h2>", table(summary.SKIP_COLUMNS, skipped, "words")]
    parts += [f"<h2>Failures</h2><pre>{escape(text)}</pre>" for text in summary.failures(rows)]
    head = f'<meta charset="utf-8"><title>splitwiser bench</title><style>{_STYLE}</style>'
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _runs(rows: Sequence[Json]) -> str:
    """What was measured with, and how long each start took."""
    about = [row for row in rows if row["kind"] == "run"]
    starts = [[row["run"], row["stage"], f"{row['start_s']:.0f}"] for row in rows if row["kind"] == "start"]
    texts = [f"<pre>{escape(json.dumps({k: v for k, v in row.items() if k != 'kind'}))}</pre>" for row in about]
    return "".join(texts) + (table(("run", "stage", "start, s"), starts, "words") if starts else "")


def _workload(name: str, cells: dict[summary.Key, summary.Summary]) -> str:
    kind = next(cell.kind for cell in cells.values() if cell.workload == name)
    if kind == "batch":
        return f"<h2>{escape(name)}</h2>" + table(summary.BATCH_COLUMNS, summary.batch_table(name, cells))
    return f"<h2>{escape(name)}</h2>" + table(summary.STREAM_COLUMNS, summary.stream_table(name, cells))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], style: str = "") -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<table class="{style}"><tr>{head}</tr>\n{body}</table>'
