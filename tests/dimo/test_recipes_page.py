"""The page of recipe keys says what the classes say; run this file to write it."""

import ast
import dataclasses
import inspect
import re
import textwrap
from pathlib import Path

from dimo.config import list_recipes, load_recipe
from dimo.methods.base import DistillationRecipe, Optimization
from dimo.methods.di4c.method import Di4CRecipe
from dimo.methods.dimo.recipe import DiMORecipe
from dimo.methods.frechet.method import FrechetRecipe
from dimo.methods.masked_data import DataRecipe
from dimo.methods.pretraining import ExtractorRecipe, TrainRecipe
from dimo.methods.sdtt.method import SDTTRecipe

PAGE = Path(__file__).parents[2] / "dimo/recipes/README.md"
CLASSES = {
    Optimization: "Every run",
    DistillationRecipe: "Every distillation",
    DiMORecipe: 'Di[M]O, `kind = "distill"`',
    FrechetRecipe: 'Di[M]O-FD, `kind = "dimo-fd"`, which has these beside the keys of Di[M]O',
    DataRecipe: "di4c and SDTT, which learn from data",
    Di4CRecipe: 'di4c and di4c-d, `kind = "di4c"`',
    SDTTRecipe: 'SDTT, `kind = "sdtt"`',
    TrainRecipe: 'A bundled teacher, `kind = "train"`',
    ExtractorRecipe: 'The networks of bundled protocols, `kind = "extractor"`',
}
INTRO = """# Recipes

A recipe is a TOML file of the keys below. `dimo distill --recipe NAME_OR_FILE --set KEY=VALUE`
reads one and changes keys; `--dry-run` prints every key of the result. A key without a default must
be given. This page is written from the classes that read recipes; comments in a recipe say why a
value differs from the paper's.

"""


def meanings(cls):
    """Key -> its comment in the class, or its entry under `Attributes:`."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            _, sign, comment = lines[node.end_lineno - 1].partition("  # ")
            if sign:
                found[node.target.id] = comment.strip()
    _, _, entries = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    for entry in re.findall(r"^    (\w+(?:, \w+)*: .*(?:\n {8}.*)*)", entries, re.MULTILINE):
        keys, _, text = entry.partition(": ")
        found.update(dict.fromkeys(keys.split(", "), " ".join(text.split())))
    return found


def written(value):
    if value is dataclasses.MISSING:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return (
        "left open" if value is None else f'"{value}"' if isinstance(value, str) else f"{value:g}"
    )


def page():
    parts = [INTRO + "| Recipe | Kind | Teacher | What it is |\n|:--|:--|:--|:--|"]
    for name in list_recipes():
        text = (PAGE.parent / f"{name}.toml").read_text(encoding="utf-8")
        about = " ".join(re.match(r"((?:#.*\n)*)", text)[0].replace("#", " ").split())
        about = re.split(r"(?<=[a-z)])[.:] (?=[A-Z(-])", about)[0].rstrip(".")
        recipe = load_recipe(Optimization, name)
        parts.append(f"| `{name}` | {recipe.kind} | {getattr(recipe, 'teacher', '')} | {about} |")
    for cls, title in CLASSES.items():
        told, own = meanings(cls), inspect.get_annotations(cls)
        parts.append(f"\n## {title}\n\n| Key | Default | Meaning |\n|:--|:--|:--|")
        for field in dataclasses.fields(cls):
            if field.name in own:
                meaning = told[field.name].replace("|", "\\|")
                parts.append(f"| `{field.name}` | {written(field.default)} | {meaning} |")
    return "\n".join(parts) + "\n"


def test_the_page_is_what_the_classes_say():
    assert PAGE.read_text(encoding="utf-8") == page(), f"python {Path(__file__).name} writes it"


def test_the_page_has_every_class():
    kinds = {type(load_recipe(Optimization, name)) for name in list_recipes()}
    assert {base for kind in kinds for base in kind.__mro__} - {object} == set(CLASSES)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
