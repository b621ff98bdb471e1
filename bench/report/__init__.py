"""Records -> text, Markdown, LaTeX, CSV, JSON, an HTML page and plots.

`read_report` or `collect_report` selects what the tables show; a function of `FORMATS` renders it.
No format computes anything.
"""

__all__ = [
    "FORMATS",
    "ProtocolReport",
    "PublishedRow",
    "Report",
    "collect_report",
    "difference_table",
    "load_published",
    "metric_table",
    "model_card",
    "read_report",
    "report_csv",
    "report_html",
    "report_json",
    "report_latex",
    "report_markdown",
    "report_plain",
    "results_frame",
    "section_markdown",
    "update_page",
    "with_records",
]

from collections.abc import Callable
from pathlib import Path

from bench.report.collect import ProtocolReport, Report, collect_report, read_report, with_records
from bench.report.data import report_csv, report_json
from bench.report.latex import report_latex
from bench.report.markdown import model_card, report_markdown, section_markdown, update_page
from bench.report.plain import report_plain
from bench.report.quoted import PublishedRow, load_published
from bench.report.runs import difference_table, metric_table
from bench.report.table import results_frame
from dimo.util.terminal import Progress, quiet


def report_html(report: Report, *, runs: Path | None = None, progress: Progress = quiet) -> str:
    """The report as one HTML file that loads nothing from elsewhere; see `html.render_page`."""
    from bench.report.html import render_page  # draws plots: matplotlib takes a second to import

    return render_page(report, runs=runs, progress=progress)


# What `dimo report --format` can write. A new format is a new row.
FORMATS: dict[str, Callable[[Report], str]] = {
    "text": report_plain,
    "markdown": report_markdown,
    "latex": report_latex,
    "csv": report_csv,
    "json": report_json,
    "html": report_html,
}
