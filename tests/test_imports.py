"""Who may import whom (DESIGN sec. 2), and what the light commands must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# each third-party package has one door, or a few that are named here
DOORS = {
    "accelerate": {"dimo/engine/distributed.py"},
    "typer": {"dimo/cli/"},
    "rich": {"dimo/util/terminal.py"},
    "safetensors": {"dimo/weights/files.py"},
    "sklearn": {"dimo/data/digits.py", "dimo/models/digits.py"},
    "PIL": {
        "bench/images/codec.py",
        "bench/features/resize.py",
        "bench/report/html/pictures.py",
        "dimo/zoo/loading.py",
    },
    "jinja2": {"bench/report/html/__init__.py"},
    "markupsafe": {"bench/report/html/__init__.py"},
    "matplotlib": {"bench/report/plots.py"},
    "torch_fidelity": {"bench/features/inception.py"},
    "timm": {"bench/features/dinov2.py"},
    "open_clip": {"bench/features/clip.py", "bench/suites/geneval/mask2former.py"},
    "huggingface_hub": {"dimo/weights/download.py"},
    "yaml": {"dimo/models/vqgan.py"},
    "torchvision": {"dimo/data/imagenet.py"},
    "scipy": {"bench/metrics/frechet.py"},
    "tensorboard": {"dimo/engine/tracking.py"},
    "wandb": {"dimo/engine/tracking.py"},
    "diffusers": {"dimo/models/diffusers_vq.py"},
    "transformers": {"bench/suites/geneval/mask2former.py", "dimo/models/clip_text.py"},
}


def _imports(path):
    """Dotted names imported anywhere in a file, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files(package):
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", _files("dimo"), ids=str)
def test_only_the_command_line_sees_bench(path):
    if path.parent.name != "cli":
        assert not [name for name in _imports(path) if name.split(".")[0] == "bench"]


@pytest.mark.parametrize("package", DOORS)
def test_each_dependency_has_its_door(package):
    users = {
        _door(str(path.relative_to(ROOT)))
        for path in _files("dimo") + _files("bench")
        if any(name.split(".")[0] == package for name in _imports(path))
    }
    assert users == DOORS[package]


def _door(path):
    return "dimo/cli/" if path.startswith("dimo/cli/") else path


def test_metrics_see_arrays_only():
    for path in set(_files("bench/metrics")) - {ROOT / "bench/metrics/scores.py"}:
        names = {name for name in _imports(path) if name.startswith(("bench.", "dimo."))}
        allowed = ("bench.metrics", "bench.features.stats", "dimo.errors")
        assert all(name.startswith(allowed) for name in names), path


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["report", "--help"], ["report"], ["protocols", "list"]]
    + [["report", "-f", name] for name in ("latex", "csv", "json", "html")]
    + [["report", "--ablation"], ["report", "--update", "page.md"]]
    + [["weights", "--help"], ["weights", "list"], ["weights", "list", "--json"]]
    + [["results", "--help"], ["results", "list"], ["verify", "--help"]],
    ids=" ".join,
)
def test_light_commands_do_not_load_torch(arguments, tmp_path):
    (tmp_path / "results").mkdir()
    for path in (ROOT / "results").glob("*.json"):
        (tmp_path / "results" / path.name).symlink_to(path)
    marks = "<!-- dimo report --protocol digits -->\n<!-- dimo report end -->\n"
    (tmp_path / "page.md").write_text(marks)
    code = (
        "import sys; sys.argv = ['dimo', *sys.argv[1:]]\n"
        "from dimo.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_no_file_says_too_many_things():
    long = {p.name: n for p in _files("dimo") + _files("bench") if (n := _lines(p)) > 450}
    assert not long


def _lines(path):
    return len(path.read_text().splitlines())
