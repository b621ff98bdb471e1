"""Who may import whom (DESIGN sec. 2), and what the light commands must not load."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Low to high: a module imports from its own layer and those below. The longest prefix counts.
LAYERS = [
    ["dimo.errors", "dimo.util"],
    ["dimo.weights", "dimo.rng", "dimo.masking"],
    ["dimo.models", "dimo.data"],
    ["dimo.guidance", "dimo.initialization", "dimo.samplers"],
    ["dimo.engine"],
    ["dimo.methods", "dimo.config"],
    ["dimo.zoo"],
    ["dimo.engine.runs", "dimo.engine.estimate"],
    ["dimo.weights.convert", "dimo.weights.exchange", "dimo.data.encode"],
    ["bench.protocol", "bench.images"],
    ["bench.features"],
    ["bench.metrics", "bench.records", "bench.rows"],
    ["bench.suites"],
    ["bench.tuning", "bench.monitor", "bench.runner", "bench.records.reproduce"],
    ["bench.report"],
    ["dimo.cli", "dimo.__main__"],
]
PUBLIC = {"dimo", "bench"}  # lazy: they name what lies above them
# each third-party package has one door, or a few that are named here
DOORS = {
    "accelerate": {"dimo/engine/distributed.py"},
    "typer": {"dimo/cli/"},
    "rich": {"dimo/util/terminal.py"},
    "safetensors": {"dimo/weights/files.py"},
    "sklearn": {"dimo/models/digits.py"},
    "PIL": {
        "bench/images/codec.py",
        "bench/features/resize.py",
        "bench/report/html/pictures.py",
        "dimo/zoo/generator.py",
    },
    "jinja2": {"bench/report/html/__init__.py"},
    "markupsafe": {"bench/report/html/__init__.py"},
    "matplotlib": {"bench/report/plots.py"},
    "torch_fidelity": {"bench/features/inception.py"},
    "timm": {
        "bench/features/dinov2.py",
        "bench/features/image_reward.py",
        "bench/features/vision.py",
    },
    "open_clip": {"bench/features/clip.py", "bench/suites/geneval/mask2former.py"},
    "huggingface_hub": {"dimo/weights/download.py"},
    "yaml": {"dimo/models/vqgan.py"},
    "torchvision": {"dimo/zoo/teachers.py"},
    "scipy": {
        "bench/metrics/frechet.py",
        "bench/records/compare.py",
        "dimo/samplers/ordered.py",
    },
    "tensorboard": {"dimo/engine/tracking.py"},
    "wandb": {"dimo/engine/tracking.py"},
    "diffusers": {"dimo/models/snapshot.py", "dimo/weights/pipeline.py"},
    "transformers": {"dimo/models/snapshot.py"},
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


def _module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported_modules(path, modules):
    """Our modules that a file imports, also inside functions and for type checking."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & modules.keys()
            if not inner <= modules.keys():  # a name of the module itself
                names |= {node.module} & modules.keys()
    return names - PUBLIC - {_module(path)}


MODULES = {_module(path): path for path in _files("dimo") + _files("bench")}


def _layer(module):
    """Number of the layer with the longest prefix of the module's name."""
    prefixes = [
        (len(prefix), number)
        for number, layer in enumerate(LAYERS)
        for prefix in layer
        if module == prefix or module.startswith(prefix + ".")
    ]
    assert prefixes, f"{module} is in no layer"
    return max(prefixes)[1]


def test_modules_of_some_systems_are_imported_where_they_are_used():
    """So that a module can be imported without them, as on Windows."""
    for path in _files("dimo") + _files("bench"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
                assert not names & {"fcntl", "resource", "pwd", "termios"}, path


def test_imports_go_one_way():
    upward = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        if module not in PUBLIC
        for name in _imported_modules(path, MODULES)
        if _layer(name) > _layer(module)
    ]
    assert not upward


def test_no_circle_between_modules():
    edges = {m: _imported_modules(p, MODULES) for m, p in MODULES.items() if m not in PUBLIC}
    sorter = graphlib.TopologicalSorter(edges)
    sorter.prepare()  # raises CycleError


def test_each_dependency_has_its_door():
    users = {package: set() for package in DOORS}
    for path in MODULES.values():
        for package in {name.split(".")[0] for name in _imports(path)} & DOORS.keys():
            users[package].add(_door(str(path.relative_to(ROOT))))
    assert users == DOORS


def test_the_shape_of_the_house():
    for package, most in (("dimo", 8), ("bench", 6)):
        assert len(list((ROOT / package).glob("*.py"))) <= most
    assert len(MODULES) <= 182
    long = {p.name: n for p in MODULES.values() if (n := len(p.read_text().splitlines())) > 450}
    assert not long


def test_long_parameter_lists_are_commands():
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "cli" not in path.parts:
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                assert len(arguments) <= 10 + (
                    arguments[:1] != [] and arguments[0].arg == "self"
                ), f"{path}: {node.name}"


def test_the_command_line_stays_in_the_command_line():
    for module, path in MODULES.items():
        text = path.read_text()
        assert "sys.argv" not in text or module.startswith("dimo.cli"), module
        assert "isinstance(recipe" not in text or module.startswith("dimo.methods"), module


def _door(path):
    return "dimo/cli/" if path.startswith("dimo/cli/") else path


def test_metrics_see_arrays_only():
    for path in set(_files("bench/metrics")) - {ROOT / "bench/metrics/scores.py"}:
        names = {name for name in _imports(path) if name.startswith(("bench.", "dimo."))}
        allowed = ("bench.metrics", "bench.features.stats", "dimo.errors")
        assert all(name.startswith(allowed) for name in names), path


def test_evaluation_networks_never_enter_a_training():
    """A student may be tuned to what it is scored by; these networks only score.

    Nothing in `dimo` but the command line imports `bench` (see the layers), and only the recipes
    that train these networks name them. The command line's use is `bench.monitor`, which looks.
    """
    named = {
        str(path.relative_to(ROOT))
        for path in [*(ROOT / "dimo").rglob("*.py"), *(ROOT / "dimo").rglob("*.toml")]
        if any(
            name in path.read_text() for name in ("digits-cnn", "scenes-clip", "scenes-detector")
        )
    }
    assert named == {
        *(f"dimo/recipes/{name}.toml" for name in EVALUATION),
        *("dimo/methods/pretraining.py", "dimo/cli/train.py"),
    }
    for method in ("dimo", "di4c", "sdtt"):
        for path in (ROOT / "dimo" / "methods" / method).glob("*.py"):
            assert not any(name.startswith("bench") for name in _imports(path)), path


EVALUATION = ("digits-features", "scenes-clip", "scenes-detector")  # recipes that train them
LIGHT = (
    *("--help", "--version", "report --help", "report", "protocols list"),
    *(f"report -f {name}" for name in ("latex", "csv", "json", "html")),
    *("report --ablation", "report --update page.md"),
    *("weights --help", "weights list", "weights list --json"),
    *("results --help", "results list", "verify --help"),
)
COMMANDS = """
import sys
from dimo.cli import main
for command in sys.argv[1:]:
    sys.argv = ["dimo", *command.split()]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (command, stop.code)
    assert "torch" not in sys.modules, command
"""


def test_light_commands_do_not_load_torch(tmp_path):
    (tmp_path / "results").mkdir()
    for path in (ROOT / "results").glob("*.json"):
        (tmp_path / "results" / path.name).symlink_to(path)
    marks = "<!-- dimo report --protocol digits -->\n<!-- dimo report end -->\n"
    (tmp_path / "page.md").write_text(marks)
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *LIGHT], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


USED_LATE = """
import sys

def assert_absent(*packages):
    assert not set(packages) & sys.modules.keys(), set(packages) & sys.modules.keys()

import bench.features
assert_absent("torch_fidelity", "cleanfid", "timm", "open_clip", "PIL")
import torch
from dimo.models import snapshot
from dimo.zoo.loading import load_teacher
load_teacher("digits", device=torch.device("cpu")).teacher.class_names
assert_absent("torchvision", "diffusers", "transformers")
"""


def test_what_one_model_needs_is_imported_for_it_alone():
    done = subprocess.run([sys.executable, "-c", USED_LATE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
