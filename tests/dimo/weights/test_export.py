"""Students as official files and back: the same bits, and nothing else is taken for one."""

import dataclasses
import resource
import shutil

import pytest
import torch

from dimo.engine.distributed import Runtime
from dimo.engine.runs import distill
from dimo.errors import DimoError
from dimo.methods.base import ALL_MASKED
from dimo.methods.dimo.recipe import DiMORecipe
from dimo.weights.catalog import ASSETS
from dimo.weights.convert import check, convert
from dimo.weights.exchange import export_student, import_student
from dimo.weights.files import load_metadata, read_state_dict, save_tensors
from dimo.zoo.loading import load_network, load_student
from dimo.zoo.students import find_student, save_student
from dimo.zoo.teachers import TEACHERS

CPU = torch.device("cpu")
SETTINGS = {"init_mask_ratio": 0.5, "embedding_noise": 0.2, "temperature": 3.0}


@pytest.fixture
def run(small_maskgit, tmp_path):
    """A finished run of the small teacher."""
    recipe = DiMORecipe(
        teacher="maskgit",
        steps=2,
        batch_size=4,
        learning_rate=1e-4,
        auxiliary_learning_rate=1e-4,
    )
    distill(
        recipe, tmp_path / "run", recipe_name="mine", runtime=Runtime(CPU), weights=small_maskgit
    )
    return tmp_path / "run"


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "student.safetensors"])
def test_a_round_trip_is_bit_equal(run, small_maskgit, tmp_path, name):
    file = tmp_path / "out" / name
    export_student(run, file)
    import_student(file, tmp_path / "again", teacher="maskgit", **SETTINGS)
    states = [read_state_dict(p / "student.safetensors") for p in (run, tmp_path / "again")]
    assert same_bits(*states)
    student = load_student(tmp_path / "again", device=CPU, weights=small_maskgit).student
    assert {key: getattr(student, key) for key in SETTINGS} == SETTINGS
    assert student.recipe.startswith(f"imported from {name}, sha256 ")
    if name == "pytorch_model.bin":  # it has no place for more
        assert student.images_seen is student.teacher_sha256 is None
    else:
        assert student.images_seen == 8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_whatever_reads_them(tmp_path, value):
    row, file, run = TEACHERS["digits"], tmp_path / "diverged.pth", tmp_path / "run"
    shutil.copytree(ASSETS / "digits-dimo", run)
    state = read_state_dict(run / "student.safetensors")
    key = next(iter(state))
    state[key].view(-1)[-1] = value
    torch.save(state, file)
    save_tensors(run / "student.safetensors", state)
    calls = [
        lambda: import_student(file, tmp_path / "imported", teacher="digits"),
        lambda: export_student(run, tmp_path / "exported.bin"),
        lambda: convert(file, tmp_path / "converted"),
        lambda: load_student(run, device=CPU),
        lambda: load_network(row, file),
    ]
    before = sorted(tmp_path.rglob("*"))
    for call in calls:
        with pytest.raises(DimoError, match=f"not finite, in {key}"):
            call()
    assert sorted(tmp_path.rglob("*")) == before
    torch.save({"of.no.known.network": torch.tensor([value])}, tmp_path / "unknown.pth")
    for finding in check([str(file), str(tmp_path / "unknown.pth")], tmp_path):
        assert "not finite" in finding.problems[0]


def test_the_official_layout(run, small_maskgit, tmp_path):
    """Types, keys, shapes and order of the official file."""
    export_student(run, tmp_path / "pytorch_model.bin")
    ours, official = (
        torch.load(folder / "pytorch_model.bin", weights_only=True)
        for folder in (tmp_path, small_maskgit)
    )
    assert [(k, v.dtype, v.shape) for k, v in ours.items()] == [
        (k, v.dtype, v.shape) for k, v in official.items()
    ]
    network = TEACHERS["maskgit"].architecture(**TEACHERS["maskgit"].network)
    network.load_state_dict(ours, strict=True)


def test_an_official_file_becomes_a_run_and_itself_again(small_maskgit, tmp_path):
    official = small_maskgit / "pytorch_model.bin"
    import_student(official, tmp_path / "run", teacher="maskgit", **SETTINGS)
    export_student(tmp_path / "run", tmp_path / "pytorch_model.bin")
    states = [torch.load(p, weights_only=True) for p in (official, tmp_path / "pytorch_model.bin")]
    assert same_bits(*states)


def test_safetensors_carry_the_settings(tmp_path):
    export_student("digits-dimo", tmp_path / "student.safetensors")
    found = load_metadata(tmp_path / "student.safetensors")
    assert (found["teacher"], found["temperature"]) == ("digits", 0.2)
    assert "training_seconds" not in found


def test_an_existing_file_is_replaced_only_on_demand(tmp_path):
    out = tmp_path / "pytorch_model.bin"
    out.write_bytes(b"mine")
    with pytest.raises(DimoError, match="--force"):
        export_student("digits-dimo", out)
    assert out.read_bytes() == b"mine"
    export_student("digits-dimo", out, force=True)
    first = out.read_bytes()
    export_student("digits-dimo", out, force=True)
    assert out.read_bytes() == first  # the same bytes each time
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


def test_what_cannot_be_exported(tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "file").touch()
    for run, out, said in (
        (tmp_path / "unfinished", "a.bin", "is not finished"),
        (tmp_path / "nowhere", "a.bin", "does not exist"),
        ("digits-dimo", "a.pt", r"suffix '.pt'; allowed: .bin and .safetensors"),
        ("digits-dimo", "file/a.bin", "cannot write"),
    ):
        with pytest.raises(DimoError, match=said):
            export_student(run, tmp_path / out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "unfinished"]


@pytest.mark.parametrize(
    ("teacher", "noise", "temperature"), [("digits", 0.0, 0.3), ("maskgit", 0.1, 7.0)]
)
def test_defaults_are_those_of_the_teachers_recipe(
    teacher, noise, temperature, small_maskgit, tmp_path
):
    file = small_maskgit / "pytorch_model.bin"
    if teacher == "digits":
        file = tmp_path / "digits.bin"
        export_student("digits-dimo", file)
    student = import_student(file, tmp_path / "run", teacher=teacher)
    assert (student.init_mask_ratio, student.embedding_noise) == (0.6, noise)
    assert student.temperature == temperature
    assert student.temperature_selected_by == f"as in the recipe of teacher '{teacher}'"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": "digits"}, "do not fit MaskGIT"),
        ({"teacher": "halton-tiny"}, "a Halton-MaskGIT transformer is needed"),
        ({"init_mask_ratio": 1.1}, "--init-mask-ratio 1.1 is out of range"),
        ({"temperature": float("nan")}, "--temperature nan is out of range"),
    ],
)
def test_what_cannot_be_imported(small_maskgit, tmp_path, changes, said):
    file = small_maskgit / "pytorch_model.bin"
    with pytest.raises(DimoError, match=said):
        import_student(file, tmp_path / "run", **{"teacher": "maskgit", **SETTINGS, **changes})
    assert not (tmp_path / "run").exists()


def test_other_files_and_used_folders_are_refused(small_maskgit, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.json").touch()
    for file, out, said in (
        (small_maskgit / "last.ckpt", "run", "look like those of a taming VQGAN"),
        (tmp_path / "no.bin", "run", "no weights file"),
        (small_maskgit / "pytorch_model.bin", "used", "not empty, it has config.json"),
    ):
        with pytest.raises(DimoError, match=said):
            import_student(file, tmp_path / out, teacher="maskgit", **SETTINGS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["x.bin", "x.safetensors"])
def test_any_precision_goes_in_and_out(small_maskgit, tmp_path, dtype, name):
    official = read_state_dict(small_maskgit / "pytorch_model.bin")
    torch.save({key: value.to(dtype) for key, value in official.items()}, tmp_path / "in.pth")
    import_student(tmp_path / "in.pth", tmp_path / "run", teacher="maskgit", **SETTINGS)
    export_student(tmp_path / "run", tmp_path / name)
    states = [read_state_dict(tmp_path / file) for file in ("in.pth", name)]
    assert same_bits(*states)
    model = load_student(tmp_path / "run", device=CPU, weights=small_maskgit).model
    loaded = model.state_dict()
    assert all(torch.equal(loaded[k], v.to(torch.float32)) for k, v in states[0].items())


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_student_in_16_bits_survives(tmp_path, suffix):
    export_student("scenes-dimo", tmp_path / f"x{suffix}")
    import_student(tmp_path / f"x{suffix}", tmp_path / "run", teacher="scenes")
    states = [read_state_dict(find_student(s).path) for s in ("scenes-dimo", tmp_path / "run")]
    assert same_bits(*states)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_method_survives(tmp_path, suffix):
    """Also settings that the official layout of Di[M]O has no place for."""
    shipped, run = find_student("digits-dimo"), tmp_path / "run"
    state = read_state_dict(shipped.path)
    for number, changes in enumerate(
        (
            {"method": "sdtt", "temperature": 0.9, **ALL_MASKED},
            {"token_initialization": "random", "init_mask_ratio": 0.3},
        )
    ):
        config = dataclasses.replace(shipped.config, training_seconds=None, **changes)
        save_student(run, state, config)
        file, again = tmp_path / f"{number}{suffix}", tmp_path / f"again-{number}"
        export_student(run, file)
        import_student(file, again, teacher="digits")
        found = dataclasses.replace(find_student(again).config, recipe=config.recipe)
        assert found == find_student(file).config == config
        given = import_student(file, tmp_path / f"mine-{number}", teacher="digits", temperature=2.0)
        assert (given.temperature, given.method) == (2.0, config.method)
        with pytest.raises(DimoError, match="student of teacher 'digits', not of 'scenes'"):
            import_student(file, tmp_path / "other", teacher="scenes")


def test_a_full_disk_is_one_line(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for name in ("x.bin", "x.safetensors"):
            with pytest.raises(DimoError, match=r"cannot write .*File too large.*; free space"):
                export_student("digits-dimo", tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_the_shipped_student_survives(tmp_path):
    export_student("digits-dimo", tmp_path / "digits.bin")
    import_student(tmp_path / "digits.bin", tmp_path / "run", teacher="digits", **SETTINGS)
    shipped = read_state_dict(ASSETS / "digits-dimo" / "student.safetensors")
    assert same_bits(read_state_dict(find_student(tmp_path / "run").path), shipped)
