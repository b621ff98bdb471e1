"""Records -> data frame (`table`, `published`) -> Markdown (`markdown`, `quoted`, `single`)."""

__all__ = [
    "PublishedRow",
    "difference_table",
    "load_published",
    "metric_table",
    "report_markdown",
    "results_frame",
]

from bench.report.markdown import report_markdown
from bench.report.published import PublishedRow, load_published
from bench.report.single import difference_table, metric_table
from bench.report.table import results_frame
