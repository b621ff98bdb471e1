"""Recipes: strict reading, overrides, and a round trip through TOML."""

import dataclasses
import math

import pytest

from dimo.config import list_recipes, load_recipe, to_toml
from dimo.errors import DimoError
from dimo.methods.di4c.method import Di4CRecipe
from dimo.methods.dimo.recipe import DiMORecipe
from dimo.methods.frechet.method import FrechetRecipe
from dimo.methods.pretraining import ExtractorRecipe, TrainRecipe
from dimo.methods.sdtt.method import SDTTRecipe
from dimo.zoo.teachers import TEACHERS

KINDS = {
    "digits": DiMORecipe,
    "digits-full": DiMORecipe,
    "digits-teacher": TrainRecipe,
    "digits-features": ExtractorRecipe,
    "scenes": DiMORecipe,
    "scenes-clip": ExtractorRecipe,
    "scenes-detector": ExtractorRecipe,
    "scenes-teacher": TrainRecipe,
    "tiny": TrainRecipe,
    "small": TrainRecipe,
    "base": TrainRecipe,
    "maskgit": DiMORecipe,
    "maskgit-official": DiMORecipe,
    "halton": DiMORecipe,
    "meissonic": DiMORecipe,
    "meissonic-official": DiMORecipe,
    "digits-dimo-fd": FrechetRecipe,
    "scenes-dimo-fd": FrechetRecipe,
    "maskgit-dimo-fd": FrechetRecipe,
    "digits-di4c": Di4CRecipe,
    "digits-di4c-d": Di4CRecipe,
    "digits-sdtt": SDTTRecipe,
    "maskgit-di4c": Di4CRecipe,
    "maskgit-di4c-d": Di4CRecipe,
}


def test_every_packaged_recipe_is_known_here():
    assert list_recipes() == sorted(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_recipes_survive_a_round_trip(name, tmp_path):
    recipe = load_recipe(KINDS[name], name)
    path = tmp_path / "copy.toml"
    path.write_text(to_toml(recipe))
    assert load_recipe(KINDS[name], str(path)) == recipe


def test_text_of_any_kind_survives_a_round_trip(tmp_path):
    path, text = tmp_path / "copy.toml", 'a\x7fb\x00\x1f\x85\u2028 "\\ \U0001f600'
    recipe = dataclasses.replace(load_recipe(DiMORecipe, "digits"), prompts=text)
    for encoding in ("utf-8", "utf-8-sig"):  # with the byte-order mark of some editors
        path.write_text(to_toml(recipe), encoding=encoding)
        assert load_recipe(DiMORecipe, str(path)) == recipe
    with pytest.raises(DimoError, match="'prompts' must be a string"):
        load_recipe(DiMORecipe, "digits", ["prompts=\udcff"])  # an argument that is no UTF-8


def test_a_folder_is_no_recipe(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    for name, said in ((tmp_path, "recipe.toml in the folder"), ("folder.toml", "Is a directory")):
        with pytest.raises(DimoError, match=said):
            load_recipe(DiMORecipe, str(tmp_path / name))


def test_overrides_are_typed():
    recipe = load_recipe(
        DiMORecipe,
        "digits",
        ["steps=7", "beta=-0.2", "lr_schedule=linear", "adam_betas=[0, 1e-1]"],
    )
    assert (recipe.steps, recipe.beta, recipe.lr_schedule) == (7, -0.2, "linear")
    assert recipe.adam_betas == (0.0, 0.1)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("step=7", "did you mean 'steps'"),
        ("steps", "is not key=value"),
        ("steps=many", "'steps' must be an integer, not 'many'"),
        ("steps=1.5", "'steps' must be an integer"),
        ("steps=0", "allowed: >= 1"),
        ("init_mask_ratio=1.5", "allowed: 0 <= x <= 1"),
        ("divergence=kl", "unknown divergence 'kl'"),
        ("mask_schedule=arcos", "did you mean 'arccos'"),
        ("precision=float8", "unknown precision 'float8'"),
        ("accumulate=0", "accumulate = 0 is out of range"),
        ("keep_every=-1", "keep_every = -1 is out of range"),
        ("max_skipped=0", "max_skipped = 0 is out of range"),
        ("lr_schedule=cosin", "did you mean 'cosine'"),
        ("learning_rate=0", "learning_rate = 0.0 is out of range"),
        ("temperature=0", "temperature = 0.0 is out of range"),
        ("adam_betas=[0.9]", "'adam_betas' must be a list of 2 values"),
        ("temperature=1e40", "temperature = 1e+40 is out of range; allowed: at most 1e+06"),
        ("teacher_guidance_scale=-1e40", "allowed: at most 1e+06"),
        ("beta=nan", "'beta' must be a finite number"),
        ("adam_eps=0", "allowed: > 0"),
        ("weighting=dm", "did you mean 'dmd'"),
        ("token_initialization=mask", "did you mean 'masked'"),
        ("embedding_noise_warmup=cosine", "did you mean 'cos'"),
        ("embedding_noise_warmup=linear", "embedding_noise_warmup_steps = 0 is out of range"),
        ("teacher_guidance=adaptiv", "did you mean 'adaptive'"),
        ("loss_reduction=max", "allowed: mean, sum"),
        ("soft_target_reduction=max", "allowed: mean, sum"),
        ("auxiliary_mask_schedule=arcos", "did you mean 'arccos'"),
        ("auxiliary_samples=share", "did you mean 'shared'"),
        ("mask_ratio_range=[0.9, 0.1]", "allowed: 0 <= low <= high <= 1"),
        ("init_mask_ratio_range=[0.1, 1.1]", "allowed: 0 <= low <= high <= 1"),
        ("init_mask_ratio_range=[0.1]", "must be a list of 2 values"),
        ("inference_mask_ratio=2", "allowed: 0 <= x <= 1"),
        ("fully_masked=1.5", "allowed: 0 <= x <= 1"),
        ("soft_targets=-0.1", "allowed: 0 <= x <= 1"),
        ("label_smoothing=1", "allowed: 0 <= x < 1"),
        ("teacher_temperature=0", "teacher_temperature = 0.0 is out of range"),
    ],
)
def test_bad_overrides_are_one_line(override, words):
    with pytest.raises(DimoError) as caught:
        load_recipe(DiMORecipe, "digits", [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shared_samples_and_a_schedule_of_their_own_exclude_each_other():
    settings = ["auxiliary_samples=shared", "auxiliary_mask_schedule=cosine"]
    with pytest.raises(DimoError, match=r"needs auxiliary_samples = .*leave one of them out$"):
        load_recipe(DiMORecipe, "digits", settings)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind = 'distil'", "did you mean 'distill'"),
        ("kind = 'distill'\nteacher = 'digits'", "missing"),
        ("kind = 'train'", "is of kind 'train'"),
        ("kind = ", "not valid TOML"),
    ],
)
def test_bad_files_are_one_line(tmp_path, text, words):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(DimoError) as caught:
        load_recipe(DiMORecipe, str(path))
    assert words in str(caught.value)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(DimoError, match="did you mean 'digits-full'"):
        load_recipe(DiMORecipe, "digits-ful")
    with pytest.raises(DimoError, match="no recipe file"):
        load_recipe(DiMORecipe, "nowhere.toml")


def test_learning_rate_is_a_function_of_the_step():
    recipe = load_recipe(
        DiMORecipe, "digits", ["steps=110", "lr_warmup_steps=10", "lr_schedule=linear"]
    )
    factors = [recipe.learning_rate_factor(step) for step in (0, 4, 10, 60, 109)]
    assert factors == pytest.approx([0.1, 0.5, 1.0, 0.5, 0.01])
    ends = {}
    for schedule in ("constant", "linear", "cosine"):
        ending = dataclasses.replace(recipe, lr_schedule=schedule, lr_final=0.2)
        ends[schedule] = [ending.learning_rate_factor(step) for step in (4, 10, 60, 110)]
    assert ends["constant"] == pytest.approx([0.5, 1, 1, 1])
    assert ends["linear"] == pytest.approx([0.5, 1, 0.6, 0.2])
    assert ends["cosine"] == pytest.approx([0.5, 1, 0.6, 0.2])
    with pytest.raises(DimoError, match=r"recipe key lr_final = 1\.5 is out of range"):
        dataclasses.replace(recipe, lr_final=1.5)


def test_beta_moves_in_the_third_quarter_of_a_run():
    recipe = load_recipe(DiMORecipe, "digits", ["steps=100", "beta=0.1"])
    assert [recipe.beta_at(step) for step in (0, 99)] == [0.1, 0.1]
    moving = dataclasses.replace(recipe, beta_final=-0.3)
    betas = [moving.beta_at(step) for step in (0, 50, 60, 75, 100)]
    assert betas == pytest.approx([0.1, 0.1, -0.06, -0.3, -0.3])
    with pytest.raises(DimoError, match="recipe key beta_final = nan is out of range"):
        dataclasses.replace(recipe, beta_final=math.nan)


def test_optional_keys_survive_a_round_trip(tmp_path):
    recipe = load_recipe(
        DiMORecipe,
        "digits",
        [
            *("init_mask_ratio_range=[0.1, 0.9]", "auxiliary_mask_schedule=cosine"),
            "auxiliary_samples=fresh",
        ],
    )
    assert recipe.label_smoothing is None
    path = tmp_path / "copy.toml"
    path.write_text(to_toml(recipe))
    assert load_recipe(DiMORecipe, str(path)) == recipe


def test_r_in_sampling():
    def found(*overrides):
        return load_recipe(DiMORecipe, "digits", overrides).sampling_mask_ratio

    assert found() == 0.6
    assert found("init_mask_ratio_range=[0.1, 0.9]") == pytest.approx(0.5)
    given = "inference_mask_ratio=0.4"
    assert found("init_mask_ratio_range=[0.1, 0.9]", given) == found(given) == 0.4


def test_the_docstring_explains_every_key_of_a_distillation():
    own = DiMORecipe.__annotations__.keys() - {"kind"}
    told = {line.strip().split(":")[0] for line in DiMORecipe.__doc__.splitlines()}
    assert own <= told


def test_the_official_recipe_has_the_official_values():
    """Facts of the authors' configuration and launch script."""
    recipe = load_recipe(DiMORecipe, "maskgit-official")
    expected = {
        "batch_size": 64,
        "steps": 30000,
        "learning_rate": 1e-5,
        "auxiliary_learning_rate": 1e-5,
        "adam_betas": (0.9, 0.999),
        "adam_eps": 1e-6,
        "weight_decay": 0.0,
        "lr_warmup_steps": 100,
        "ema_decay": 0.9999,
        "teacher_guidance_scale": 2.0,
        "init_mask_ratio": 0.6,
        "embedding_noise": 0.1,
        "label_smoothing": 0.1,
        "keep_mask_class": True,
        "beta": 0.0,
    }
    assert {key: getattr(recipe, key) for key in expected} == expected


def test_our_recipe_for_maskgit_differs_where_it_says_so():
    ours, official = (load_recipe(DiMORecipe, n) for n in ("maskgit", "maskgit-official"))
    differing = {
        field.name
        for field in dataclasses.fields(DiMORecipe)
        if getattr(ours, field.name) != getattr(official, field.name)
    }
    assert differing == {
        "auxiliary_samples",
        "beta",
        "keep_mask_class",
        "seed",
        "label_smoothing",  # left to the teacher's row, which says the same
        "auxiliary_mask_schedule",  # likewise the schedule of the student
        "temperature_selected_by",
    }


@pytest.mark.parametrize("teacher", TEACHERS.values(), ids=lambda teacher: teacher.name)
def test_every_teacher_has_a_recipe(teacher):
    recipe = load_recipe(DiMORecipe, teacher.recipe, [f"teacher={teacher.name}"])
    assert recipe.label_smoothing in (None, teacher.label_smoothing)
