"""The order of a report in words: protocol by protocol, then what is quoted, then files left out.

Markdown and LaTeX write this outline; the page has its own.
"""

from itertools import groupby

from bench.report.ablation import ablation_blocks
from bench.report.document import ProtocolReport, Report
from bench.report.notes import measured_blocks
from bench.report.quoted import quoted_blocks
from bench.report.text import LONGEST_NOTE, Block, Bullets, Code, Heading, Line, joined


def report_blocks(report: Report) -> list[Block]:
    """Everything. Headings of level 1 are protocols, quoted results and files left out."""
    blocks: list[Block] = []
    for _, parts in groupby(report.protocols, key=lambda part: part.sha256):
        alike = list(parts)
        blocks.append(Heading(1, (alike[0].protocol.title,)))
        blocks += _protocol_blocks(alike, ablation=report.ablation)
    if not report.ablation:
        blocks += quoted_blocks([row for part in report.protocols for row in part.quoted])
    if report.problems:
        listed: list[Line] = [(Code(problem, LONGEST_NOTE),) for problem in report.problems]
        blocks += [Heading(1, ("Files left out",)), Bullets(tuple(listed))]
    return blocks


def measured_part(report: Report) -> list[Block]:
    """The tables of the protocols without their titles, what is quoted and files left out."""
    return _protocol_blocks(list(report.protocols), ablation=report.ablation)


def _protocol_blocks(parts: list[ProtocolReport], *, ablation: bool) -> list[Block]:
    blocks: list[Block] = []
    for part in parts:
        if len(parts) > 1 and part.measured_with:
            hashes = joined((Code(digest[:12]),) for digest in part.measured_with)
            blocks.append(Heading(2, ("Measured with ", *hashes)))
        blocks += ablation_blocks(part) if ablation else measured_blocks(part)
    return blocks
