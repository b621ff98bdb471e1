"""The report as LaTeX to paste into a paper: ASCII only, any text escaped.

Needs the packages booktabs (rules) and graphicx (a table that is too wide is scaled to the text
width), which every TeX distribution has; works with pdfLaTeX, XeLaTeX and LuaLaTeX. A table is one
float: of more rows than a page holds, take some.
"""

import functools
import re
import unicodedata
from itertools import groupby

from bench.report.document import Report
from bench.report.outline import report_blocks
from bench.report.text import (
    Block,
    Bullets,
    Code,
    Heading,
    Line,
    Paragraph,
    Piece,
    Source,
    Strong,
    Table,
    Words,
    one_line,
)

_PREAMBLE = r"% Made by dimo report. Needs: \usepackage{booktabs} \usepackage{graphicx}"
_SHRUNK = r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%"
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"{\char34}",
    "`": r"\`{}",
    "\u200b": "{}",
    "\u2013": "--",
    "\u2014": "---",
    "\u2018": "`",
    "\u2019": "'",
    "…": r"\ldots{}",
    "±": r"$\pm$",
    "\u00d7": r"$\times$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "†": r"$\dagger$",
    "ß": r"\ss{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
}
_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0304": "=",
    "\u0306": "u",
    "\u0307": ".",
    "\u0308": '"',
    "\u030a": "r",
    "\u030b": "H",
    "\u030c": "v",
    "\u0327": "c",
}
_GREEK = (  # the letters that TeX has a command for; the others look like Latin ones
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"),
    *("lambda", "mu", "nu", "xi", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi"),
    *("omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi"),
    *("Psi", "Omega"),
)
_SHOWN_OF_A_RUN = 3  # characters that TeX may have no glyph for


def report_latex(report: Report) -> str:
    """Tables, captions and notes in the words of the Markdown report; ends with a newline."""
    return "\n\n".join([_PREAMBLE, *map(_block, report_blocks(report))]) + "\n"


def latex_text(text: str) -> str:
    """Any line as LaTeX that prints it: ASCII, no command or character of TeX takes effect.

    Letters with common accents and Greek are set; other characters as `U+05D0`, a long run of them
    by its first ones.
    """
    pieces: list[str] = []
    text = re.sub(r"-(?=-)", "-\u200b", text)  # two would become a dash
    for known, run in groupby(text, key=lambda c: _set(c) is not None):
        if known:
            pieces += [_set(c) or "" for c in run]
            continue
        codes = [f"U+{ord(c):04X}" for c in run]
        more = [r"\ldots{}"] * (len(codes) > _SHOWN_OF_A_RUN)
        pieces.append(rf"\texttt{{{' '.join([*codes[:_SHOWN_OF_A_RUN], *more])}}}")
    return "".join(pieces)


@functools.cache
def _set(character: str) -> str | None:
    """How one character is set; None: TeX may have no glyph for it."""
    if character in _SPECIAL:
        return _SPECIAL[character]
    if " " <= character <= "~":
        return character
    name = unicodedata.name(character, "")
    greek = re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (\w+)", name)
    if greek is not None:
        letter = greek[2].lower().replace("lamda", "lambda")
        letter = letter.capitalize() if greek[1] == "CAPITAL" else letter
        return rf"$\{letter}$" if letter in _GREEK else None
    parts = unicodedata.normalize("NFD", character)
    if len(parts) == 2 and parts[0].isascii() and parts[1] in _ACCENTS:
        return rf"\{_ACCENTS[parts[1]]}{{{parts[0]}}}"
    return None


def _block(block: Block) -> str:
    if isinstance(block, Heading):
        return rf"\{'sub' * (block.level - 1)}section*{{{_line(block.line)}}}"
    if isinstance(block, Paragraph):
        return _line(block.line)
    if isinstance(block, Bullets):
        items = "\n".join(rf"  \item {_guarded(_line(item))}" for item in block.items)
        return f"\\begin{{itemize}}\n{items}\n\\end{{itemize}}"
    return _table(block)


def _table(table: Table) -> str:
    columns = "".join("l" if i in table.left else "r" for i in range(len(table.header)))
    lines = [r"\begin{table*}[htbp]", r"  \centering"]
    if table.caption:
        lines.append(rf"  \caption{{{_line(table.caption)}}}")
    lines += [f"  {_SHRUNK}", rf"  \begin{{tabular}}{{{columns}}}", r"    \toprule"]
    lines.append(_row([latex_text(heading) for heading in table.header]))
    before = None
    for index, cells in enumerate(table.body):
        section = table.sections[index] if table.sections else None
        if index == 0 or section != before:
            lines.append(r"    \midrule")
            if section is not None:
                words = latex_text(one_line(section, 60))
                span = rf"\multicolumn{{{len(columns)}}}{{l}}{{\textit{{{words}}}}}"
                lines.append(rf"    {span} \\")
        before = section
        lines.append(_row([_line(cell) for cell in cells]))
    lines += [r"    \bottomrule", r"  \end{tabular}}", r"\end{table*}"]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"    {_guarded(' & '.join(cells))} \\\\"


def _guarded(text: str) -> str:
    """What follows `\\\\`, `\\item` or a rule must not look like an option of it."""
    return f"{{}}{text}" if text.startswith(("[", "*")) else text


def _line(line: Line) -> str:
    return "".join(_piece(piece) for piece in line)


def _piece(piece: Piece) -> str:
    if isinstance(piece, str):
        return latex_text(piece)
    if isinstance(piece, Words):
        return latex_text(one_line(piece.value, piece.longest))
    if isinstance(piece, Code):
        return rf"\texttt{{{latex_text(one_line(piece.value, piece.longest))}}}"
    if isinstance(piece, Strong):
        return rf"\textbf{{{latex_text(piece.words)}}}"
    if isinstance(piece, Source):
        return latex_text(one_line(piece.name, 60))
    shown = latex_text(piece.shown)
    return {1: rf"\textbf{{{shown}}}", 2: rf"\underline{{{shown}}}"}.get(piece.place, shown)
