"""The report as LaTeX to paste into a paper: ASCII only, every text escaped.

Needs the packages booktabs (rules) and graphicx (a table that is too wide is scaled to the text
width), which every TeX distribution has; works with pdfLaTeX, XeLaTeX and LuaLaTeX. A table is one
float; if it has more rows than fit a page, keep some of them.
"""

import functools
import re
import unicodedata
from itertools import groupby

from bench.report.collect import Report
from bench.report.measured import report_tables
from bench.report.text import Line, Styled, Table, one_line

_PREAMBLE = r"% Made by dimo report. Needs: \usepackage{booktabs} \usepackage{graphicx}"
_SHRUNK = r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%"
_SPECIAL = {
    **{character: f"\\{character}" for character in "{}$&#%_"},
    **{"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
    **{'"': r"{\char34}", "`": r"\`{}", "\u200b": "{}", "\u2018": "`", "\u2019": "'"},
    **{"\u2013": "--", "\u2014": "---", "…": r"\ldots{}", "±": r"$\pm$", "\u00d7": r"$\times$"},
    **{"↓": r"$\downarrow$", "↑": r"$\uparrow$", "†": r"$\dagger$", "ß": r"\ss{}"},
    **{"æ": r"\ae{}", "Æ": r"\AE{}", "ø": r"\o{}", "Ø": r"\O{}", "ł": r"\l{}", "Ł": r"\L{}"},
}
_MARKS = "\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327"
_ACCENTS = dict(zip(_MARKS, "`'^~=u.\"rHvc", strict=True))
_GREEK = (  # the letters that TeX has a command for; the others look like Latin ones
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"),
    *("lambda", "mu", "nu", "xi", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi"),
    *("omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi"),
    *("Psi", "Omega"),
)
_MOST_CODES = 3  # in a row, of characters that TeX may have no glyph for


def report_latex(report: Report) -> str:
    """Tables, captions and notes in the words of the Markdown report; ends with a newline."""
    return "\n\n".join([_PREAMBLE, *map(_block, report_tables(report))]) + "\n"


def latex_text(text: str) -> str:
    """Escapes any line as ASCII LaTeX.

    Letters with common accents and Greek letters are typeset; other characters become `U+05D0`, and
    a long run of them is cut.
    """
    pieces: list[str] = []
    text = re.sub(r"-(?=-)", "-\u200b", text)  # two would become a dash
    for known, run in groupby(text, key=lambda c: _typeset(c) is not None):
        if known:
            pieces += [_typeset(c) or "" for c in run]
            continue
        codes = [f"U+{ord(c):04X}" for c in run]
        more = [r"\ldots{}"] * (len(codes) > _MOST_CODES)
        pieces.append(rf"\texttt{{{' '.join([*codes[:_MOST_CODES], *more])}}}")
    return "".join(pieces)


@functools.cache
def _typeset(character: str) -> str | None:
    """LaTeX of one character; None: TeX may have no glyph for it."""
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


def _block(table: Table) -> str:
    parts = []
    if table.title:
        parts.append(rf"\{'sub' * (table.level - 1)}section*{{{_line(table.title)}}}")
    if table.header:
        parts.append(_table(table))
    elif table.caption:
        parts.append(_line(table.caption))
    if table.notes:
        items = "\n".join(rf"  \item {_guarded(_line(note))}" for note in table.notes)
        parts.append(f"\\begin{{itemize}}\n{items}\n\\end{{itemize}}")
    return "\n\n".join(parts)


def _table(table: Table) -> str:
    columns = "".join("l" if i in table.left else "r" for i in range(len(table.header)))
    lines = [r"\begin{table*}[htbp]", r"  \centering"]
    lines += [rf"  \caption{{{_line(table.caption)}}}"] if table.caption else []
    lines += [f"  {_SHRUNK}", rf"  \begin{{tabular}}{{{columns}}}", r"    \toprule"]
    lines.append(_row([latex_text(heading) for heading in table.header]))
    for index, cells in enumerate(table.rows):
        section = table.new_section(index)
        if index == 0 or section is not None:
            lines.append(r"    \midrule")
        if section is not None:
            words = latex_text(one_line(section))
            span = rf"\multicolumn{{{len(columns)}}}{{l}}{{\textit{{{words}}}}}"
            lines.append(rf"    {span} \\")
        lines.append(_row([_line(cell) for cell in cells]))
    lines += [r"    \bottomrule", r"  \end{tabular}}", r"\end{table*}"]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"    {_guarded(' & '.join(cells))} \\\\"


def _guarded(text: str) -> str:
    """Keeps text after `\\\\`, `\\item` or a rule from being read as its option."""
    return f"{{}}{text}" if text.startswith(("[", "*")) else text


def _line(line: Line) -> str:
    return "".join(_piece(piece) for piece in line)


_COMMANDS = {
    **{"code": "texttt", "strong": "textbf", "best": "textbf", "second": "underline"},
    "mark": "textsuperscript",
}


def _piece(piece: str | Styled) -> str:
    if isinstance(piece, str):
        return latex_text(piece)
    shown, command = latex_text(piece.text), _COMMANDS.get(piece.style)
    return rf"\{command}{{{shown}}}" if command else shown
