"""The report as GitHub Markdown, tables inside a hand-written page, and the card of a model."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.report.collect import Report, read_report
from bench.report.measured import protocol_tables, report_tables
from bench.report.text import LONGEST_NOTE, Line, Styled, Table, display_width, one_line
from dimo.errors import DimoError
from dimo.methods import METHODS
from dimo.util.files import sha256_file, write_atomic
from dimo.weights.catalog import OFFICIAL, name_of
from dimo.weights.download import HUB

if TYPE_CHECKING:
    from dimo.zoo.students import FoundStudent
    from dimo.zoo.teachers import Teacher

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "<span>$</span>"}
_ACTIVE = re.compile(r"[\\`*|~#&<>$_\]:.]")  # whatever may have to be escaped has one of these


def report_markdown(report: Report) -> str:
    """Measured results first, then quoted ones, then files left out; ends with a newline.

    Wide tables are for a page that shows Markdown; `report_plain` is for a terminal.
    """
    return "\n\n".join(_block(table, top=2) for table in report_tables(report)) + "\n"


def section_markdown(report: Report) -> str:
    """The measured part, for a page with its own headings; GitHub shows folded tables closed."""
    tables = protocol_tables(report.protocols, ablation=report.ablation, settings=True)
    return "\n\n".join(_block(table, top=3, fold=True) for table in tables) + "\n"


def text(value: object, longest: int = 60) -> str:
    """`one_line`, escaped for Markdown and HTML; brackets only if they could make a link."""
    return _escaped(one_line(str(value), longest))


def code(value: object, longest: int = 60) -> str:
    """`one_line` as a code span. Not for table cells: a bar would end the cell."""
    line = one_line(str(value), longest)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if len(fence) > 1 else f"`{line}`"


def pipe_table(
    header: Sequence[str], body: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)
) -> str:
    """A table of escaped cells whose columns also line up as plain text.

    Columns of `left` are aligned to the left, the others to the right.
    """
    widths = [
        max(3, *(display_width(cells[column]) for cells in [header, *body]))
        for column in range(len(header))
    ]
    rule = [
        ":" + "-" * (width - 1) if column in left else "-" * (width - 1) + ":"
        for column, width in enumerate(widths)
    ]
    padded = [
        " | ".join(
            _padded(cell, width, column in left)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in [header, rule, *body]
    ]
    return "\n".join(f"| {line} |" for line in padded)


def _block(table: Table, top: int, *, fold: bool = False) -> str:
    """A table with its heading and notes; `top` is the level of the highest heading."""
    folded = fold and table.folded
    parts = []
    if folded:
        parts.append(f"<details><summary>{_line(table.title)}</summary>")
    elif table.title:
        parts.append(f"{'#' * (table.level + top - 1)} {_line(table.title)}")
    if table.header:
        header = [_escaped(heading) for heading in table.header]
        body: list[list[str]] = []
        for index, cells in enumerate(table.rows):
            if (section := table.new_section(index)) is not None:
                body.append([f"*{text(section)}*", *[""] * (len(header) - 1)])
            body.append([_line(cell) for cell in cells])
        parts.append(pipe_table(header, body, left=table.left))
    if table.caption:
        parts.append(_line(table.caption))
    if table.notes:
        parts.append("\n".join(f"- {_line(note)}" for note in table.notes))
    return "\n\n".join([*parts, *["</details>"] * folded])


def _line(line: Line) -> str:
    return "".join(_piece(piece) for piece in line)


def _piece(piece: str | Styled) -> str:
    if isinstance(piece, str):
        return _escaped(piece)
    if piece.style == "code":
        return code(piece.text, len(piece.text))
    if piece.style == "source" and (arxiv := re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})", piece.text)):
        return f"[{piece.text}](https://arxiv.org/abs/{arxiv[1]})"
    shown = _escaped(piece.text)
    if piece.style == "mark":
        return f"<sup>{shown}</sup>"
    if piece.style in ("strong", "best"):
        return f"**{shown}**"
    return f"<ins>{shown}</ins>" if piece.style == "second" else shown


def _escaped(line: str) -> str:
    if not _ACTIVE.search(line):
        return line
    special = r"\\`*|~#&<>$" + (r"\[\]" if re.search(r"\][(\[:]", line) else "")
    line = re.sub(f"[{special}]", lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"), line)
    line = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)
    return re.sub(r"(?i)\b(https?|ftp|www)(?=[:.])", r"\1<span></span>", line)  # no automatic link


def _padded(cell: str, width: int, left: bool) -> str:
    padding = " " * (width - display_width(cell))
    return cell + padding if left else padding + cell


def model_card(
    student: "FoundStudent", report: Report, *, address: str, diffusers: bool = False
) -> str:
    """The `README.md` of a student on a hub.

    Args:
        report: Of the student's records alone; see `weights_sha256` of `read_report`.
        address: Where the student is loaded from, e.g. `hf://OWNER/REPO`.
        diffusers: Show how diffusers loads it, too.
    """
    from dimo.zoo.teachers import get_teacher  # imports torch

    config, method = student.config, METHODS[student.config.method]
    teacher = get_teacher(config.teacher)
    licence = _licence(student.path, teacher)
    is_text = teacher.text is not None
    head = ["---", "library_name: dimo", *[f"license: {licence.lower()}"] * bool(licence)]
    head.append(f"pipeline_tag: {'text-to-image' if is_text else 'unconditional-image-generation'}")
    head.append("tags: [masked-diffusion, distillation]")
    size = teacher.image_size
    drawn = "from a prompt" if is_text else f"of {teacher.num_classes:,} classes"
    steps = "one step" if method.is_one_step else "few steps"
    parts = [
        "\n".join([*head, "---"]),
        f"# {text(student.title, LONGEST_NOTE)}",
        f"A student of the masked diffusion model {teacher.title} (`{teacher.name}`), distilled "
        f"with {method.title}. It draws {size} x {size} images {drawn} in {steps}.",
        "## Use",
        _use(teacher, address),
        *[_use_in_diffusers(teacher, address)] * diffusers,
        "## Results",
        _results(student, report, address, teacher.protocol),
        "## Training and sampling",
        "\n".join(
            f"- {key.replace('_', ' ').capitalize()}: {text(value, LONGEST_NOTE)}"
            for key, value in vars(config).items()
            if value is not None and key != "format"
        ),
        "## Intended use and licence",
        "For research on sampling in few steps, such as comparing this student with its teacher "
        "and with other students under the same protocol. It draws what the teacher learned from "
        "its training data, with the biases of that data; its images show nothing real.",
        f"Made from weights under the licence {licence}."
        if licence
        else "The source of these weights states no licence; ask its authors before sharing them.",
    ]
    return "\n\n".join(parts) + "\n"


def _licence(path: Path, teacher: "Teacher") -> str:
    """That of the file, if it is an official one, or of the teacher's; "": not stated."""
    official = OFFICIAL.get(name_of(path) or teacher.weights["transformer"])
    return official.licence if official else "Apache-2.0" * teacher.is_bundled  # as the package


_PROMPT = "a photo of a red circle"


def _use(teacher: "Teacher", address: str) -> str:
    given, option = "labels=[0, 1, 2, 3]", ""
    if teacher.text is not None:
        given, option = f'prompts=["{_PROMPT}"]', f" --prompt '{_PROMPT}'"
    size, others = teacher.image_size, {**teacher.weights, "transformer": ""}.values()
    fetched = " ".join(name for name in others if name in OFFICIAL)
    lines = [
        "```python",
        "import dimo",
        "",
        f'student = dimo.load("{address}")  # or the path of this folder',
        f"images = student.sample({given}, seed=0)  # uint8 [B, 3, {size}, {size}]",
        'images.pil()[0].save("image.png")',
        "```",
        "",
        f"From a shell: `dimo sample --model {address}{option} --out grid.png`.",
        *[f"Its teacher's other networks are fetched with `dimo weights fetch {fetched}`."]
        * bool(fetched),
    ]
    return "\n".join(lines)


def _use_in_diffusers(teacher: "Teacher", address: str) -> str:
    given = f'prompt=["{_PROMPT}"]' if teacher.text is not None else "class_labels=[0, 1, 2, 3]"
    lines = [
        "In diffusers, with dimo installed, the same images:",
        "",
        "```python",
        "import torch",
        "from diffusers import DiffusionPipeline",
        "from huggingface_hub import snapshot_download",
        "",
        f'folder = snapshot_download("{address.removeprefix(HUB)}")  # or the path of this folder',
        "pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)",
        f"images = pipe({given}, generator=torch.Generator().manual_seed(0)).images",
        'images[0].save("image.png")',
        "```",
    ]
    return "\n".join(lines)


def _results(student: "FoundStudent", report: Report, address: str, protocol: str) -> str:
    digest = f"Weights: sha256 `{sha256_file(student.path)}`."
    if not any(part.records or part.excluded for part in report.protocols):
        bench = f"dimo bench --student {address} --protocol {protocol or 'PROTOCOL'}"
        return f"Not measured yet. Measure it with `{bench}`, then export it again.\n\n{digest}"
    hashes = [
        f"- Protocol `{name}`: sha256 `{sha256}`."
        for name, sha256 in dict.fromkeys((p.protocol.name, p.sha256) for p in report.protocols)
    ]
    tables = section_markdown(report).rstrip()
    return "\n\n".join([tables, "\n".join([f"- {digest}", *hashes])])


_BLOCK = re.compile(
    r"^<!-- dimo report --protocol (\S+)( --ablation)? -->\n(.*?)^<!-- dimo report end -->$",
    re.M | re.S,
)


def update_page(path: Path, results: Path) -> tuple[bool, list[str]]:
    """Renews the tables of a Markdown file; see `renewed`.

    Returns whether the file changed, and one line per results file that was left out.

    Raises:
        DimoError: The file cannot be read or its marks do not pair.
    """
    problems: dict[str, None] = {}

    def section(protocol: str, ablation: bool) -> str:
        report = read_report(results, protocol, ablation=ablation)
        problems.update(dict.fromkeys(report.problems))
        return section_markdown(report)

    try:
        before = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DimoError(f"cannot read {path}: {error}; give a Markdown file") from error
    after = renewed(before, section)
    if after != before:
        write_atomic(path, after)
    return after != before, list(problems)


def renewed(page: str, section: Callable[[str, bool], str]) -> str:
    """A page with every table between marks replaced; the rest is unchanged.

    Args:
        page: Tables are between the lines `<!-- dimo report --protocol NAME -->` and
            `<!-- dimo report end -->`; ` --ablation` may follow the name.
        section: Protocol name, whether to show its ablations -> Markdown that ends with a newline.

    Raises:
        DimoError: There is no such table, or a mark has no partner.
    """
    begin, end = "<!-- dimo report --protocol ", "<!-- dimo report end -->"
    blocks = len(_BLOCK.findall(page))
    if not blocks or not page.count(begin) == page.count(end) == blocks:
        raise DimoError(
            f"the page has {blocks} whole tables between {begin}NAME --> and {end}, "
            f"{page.count(begin)} beginnings and {page.count(end)} ends; put each mark on its own "
            "line, in pairs"
        )

    def replacement(match: re.Match[str]) -> str:
        name, ablation = match[1], match[2] or ""
        return f"{begin}{name}{ablation} -->\n{section(name, bool(ablation))}{end}"

    return _BLOCK.sub(replacement, page)
