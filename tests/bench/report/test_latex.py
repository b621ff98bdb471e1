"""LaTeX read by a strict parser (pylatexenc), and by TeX if there is one: known and aligned."""

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pylatexenc import latexwalker, macrospec

from bench.report import Report, report_latex, report_markdown
from bench.report.latex import latex_text

# every command that may occur, with its arguments: { mandatory, [ optional, * star
COMMANDS = {
    "section": "*{", "subsection": "*{", "item": "[", "caption": "{", "resizebox": "{{{",
    "multicolumn": "{{{", "textbf": "{", "textit": "{", "texttt": "{", "underline": "{",
    "textsuperscript": "{",
    "toprule": "", "midrule": "", "bottomrule": "", "centering": "", "\\": "*[",
    "ifdim": "", "width": "", "textwidth": "", "else": "", "fi": "", "char": "",
    "textbackslash": "", "textasciicircum": "", "textasciitilde": "", "textless": "",
    "textgreater": "", "textbar": "", "ldots": "", "pm": "", "times": "", "downarrow": "",
    "uparrow": "", "dagger": "", "theta": "", "tau": "",
}  # fmt: skip
ESCAPES = {*"{}$&#%_"}
ACCENTS = {*"`'^~=.\"", "u", "r", "H", "v", "c"}
ENVIRONMENTS = {"table*": "[", "tabular": "{", "itemize": ""}


def parsed(latex: str) -> list[Any]:
    """Nodes of the whole text; anything unbalanced or unknown is an error."""
    context = macrospec.LatexContextDb()
    context.add_context_category(
        "report",
        macros=[
            *(macrospec.MacroSpec(name, arguments) for name, arguments in COMMANDS.items()),
            *(macrospec.MacroSpec(name, "") for name in ESCAPES),
            *(macrospec.MacroSpec(name, "{") for name in ACCENTS),
        ],
        environments=[
            macrospec.EnvironmentSpec(name, arguments) for name, arguments in ENVIRONMENTS.items()
        ],
        specials=[macrospec.SpecialsSpec("&")],
    )
    walker = latexwalker.LatexWalker(latex, latex_context=context, tolerant_parsing=False)
    nodes, start, length = walker.get_latex_nodes()
    assert (start, length) == (0, len(latex))
    return list(nodes)


def below(nodes: list[Any]) -> Any:
    for node in nodes:
        if node is None:
            continue
        yield node
        inside = list(getattr(node, "nodelist", None) or [])
        arguments = getattr(node, "nodeargd", None)
        yield from below(inside + list(arguments.argnlist if arguments else []))


def check(latex: str) -> int:
    """Asserts that the text is LaTeX of known commands and aligned tables; returns their number."""
    assert latex.isascii()
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", latex)
    tables = 0
    for node in below(parsed(latex)):
        if isinstance(node, latexwalker.LatexMacroNode):
            assert node.macroname in {*COMMANDS, *ESCAPES, *ACCENTS}, node.macroname
            if node.macroname in ("item", "\\"):  # text must not be taken for an option
                assert not any(node.nodeargd.argnlist), node.latex_verbatim()
        if isinstance(node, latexwalker.LatexEnvironmentNode):
            assert node.environmentname in ENVIRONMENTS
            if node.environmentname == "tabular":
                tables += 1
                check_columns(node)
        if isinstance(node, latexwalker.LatexCommentNode):
            assert node.comment.startswith((" Made by dimo report", "")), node.comment
    comments = re.findall(r"(?<!\\)%.*", latex)
    assert comments[0].startswith("% Made by dimo report")
    assert set(comments[1:]) <= {"%"}  # the line end after \resizebox
    return tables


def check_columns(table: Any) -> None:
    """Each row has as many cells as the table has columns."""
    columns = len(table.nodeargd.argnlist[0].latex_verbatim().strip("{}"))
    cells = 1
    for node in table.nodelist:
        if isinstance(node, latexwalker.LatexSpecialsNode):
            cells += 1
        elif isinstance(node, latexwalker.LatexMacroNode) and node.macroname == "multicolumn":
            cells += int(node.nodeargd.argnlist[0].latex_verbatim().strip("{}")) - 1
        elif isinstance(node, latexwalker.LatexMacroNode) and node.macroname == "\\":
            assert cells == columns
            cells = 1
        elif isinstance(node, latexwalker.LatexCharsNode):
            assert "\n\n" not in node.chars
    assert cells == 1


def test_the_study_is_the_expected_one_line_by_line(study: Report) -> None:
    latex = report_latex(study)
    assert check(latex) == 3
    expected = (Path(__file__).parent / "expected.tex").read_text(encoding="ascii")
    for number, (found, wanted) in enumerate(
        zip(latex.splitlines(), expected.splitlines(), strict=False), 1
    ):
        assert found == wanted, f"line {number}"
    assert latex == expected


def test_it_says_what_the_markdown_says(study: Report) -> None:
    """Notes on uncertainty, choice of settings, speed and code are the same items."""
    markdown = re.findall(r"^- (.*)$", report_markdown(study), re.M)
    latex = re.findall(r"^  \\item (.*)$", report_latex(study), re.M)
    assert len(markdown) == len(latex) > 10
    words = re.compile(r"\w+")
    for ours, theirs in zip(markdown, latex, strict=True):
        shown = re.sub(r"</?(ins|sup)>|\]\(http\S*\)|\\", "", ours)
        printed = re.sub(r"\\(text\w+(?=\{)|underline|textbar|pm|dagger)|\\", "", theirs)
        assert words.findall(printed) == words.findall(shown)


def test_hostile_text_is_shown_and_does_nothing(hostile: Report) -> None:
    for ablation, tables in ((False, 3), (True, 1)):
        latex = report_latex(dataclasses.replace(hostile, ablation=ablation))
        assert check(latex) == tables
        assert len(latex) < 60_000


@pytest.mark.parametrize(
    ("words", "latex"),
    [
        ("100% & #1_a ^ ~", r"100\% \& \#1\_a \textasciicircum{} \textasciitilde{}"),
        (r"\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
        ("$x$ <b> a|b", r"\$x\$ \textless{}b\textgreater{} a\textbar{}b"),
        ('a--b "c" `d`', r"a-{}-b {\char34}c{\char34} \`{}d\`{}"),
        ("Di[M]O", "Di[M]O"),
        ("θ-trapezoidal, τ", r"$\theta$-trapezoidal, $\tau$"),
        ("Frechet é Łódź ß", r"Frechet \'{e} \L{}\'{o}d\'{z} \ss{}"),
        ("雪", r"\texttt{U+96EA}"),
        ("雪" * 9, r"\texttt{U+96EA U+96EA U+96EA \ldots{}}"),
    ],
)
def test_text_is_printed_as_it_is(words: str, latex: str) -> None:
    assert latex_text(words) == latex


@pytest.mark.parametrize("broken", [r"\textbf{a", r"a } b", r"$x", r"\begin{itemize}", r"\evil{a}"])
def test_the_parser_finds_mistakes(study: Report, broken: str) -> None:
    with pytest.raises((latexwalker.LatexWalkerParseError, AssertionError)):
        check(report_latex(study) + broken)


def test_the_column_check_finds_mistakes(study: Report) -> None:
    with pytest.raises(AssertionError):
        check(report_latex(study).replace("MaskGIT & ", "MaskGIT ", 1))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex on the path")
def test_a_real_tex_takes_it(study: Report, hostile: Report, tmp_path: Path) -> None:
    packages = r"\usepackage{booktabs}\usepackage{graphicx}"
    body = report_latex(study) + report_latex(hostile)
    document = rf"\documentclass{{article}}{packages}\begin{{document}}{body}\end{{document}}"
    (tmp_path / "a.tex").write_text(document, encoding="ascii")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "a.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
