"""Records -> data frame (`table`, `published`) -> Markdown (`markdown`, `quoted`)."""

__all__ = ["PublishedRow", "load_published", "report_markdown", "results_frame"]

from bench.report.markdown import report_markdown
from bench.report.published import PublishedRow, load_published
from bench.report.table import results_frame
