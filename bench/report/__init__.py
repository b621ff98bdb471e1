"""Records -> report (`collect`, `document`) -> Markdown, LaTeX, CSV, JSON, the page and plots.

`table` and `ablation` make data frames, `outline` what is said around them, in blocks that
`markdown` and `latex` write; `data` writes CSV and JSON. No format computes anything.
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
    "report_csv",
    "report_json",
    "report_latex",
    "report_markdown",
    "results_frame",
    "section_markdown",
    "with_records",
]

from bench.report.collect import collect_report, with_records
from bench.report.data import report_csv, report_json
from bench.report.document import ProtocolReport, Report
from bench.report.latex import report_latex
from bench.report.markdown import report_markdown, section_markdown
from bench.report.published import PublishedRow, load_published
from bench.report.runs import difference_table, metric_table
from bench.report.table import results_frame

FORMATS = ("markdown", "latex", "csv", "json", "html")
