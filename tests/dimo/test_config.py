"""Recipes: strict reading, overrides, and a round trip through TOML."""

import pytest

from dimo.config import (
    DistillRecipe,
    ExtractorRecipe,
    TrainRecipe,
    list_recipes,
    load_recipe,
    to_toml,
)
from dimo.errors import DimoError

KINDS = {
    "digits": DistillRecipe,
    "digits-full": DistillRecipe,
    "digits-teacher": TrainRecipe,
    "digits-features": ExtractorRecipe,
}


def test_every_packaged_recipe_is_known_here():
    assert list_recipes() == sorted(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_recipes_survive_a_round_trip(name, tmp_path):
    recipe = load_recipe(KINDS[name], name)
    path = tmp_path / "copy.toml"
    path.write_text(to_toml(recipe))
    assert load_recipe(KINDS[name], str(path)) == recipe


def test_overrides_are_typed():
    recipe = load_recipe(
        DistillRecipe,
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
        ("beta=nan", "'beta' must be a finite number"),
    ],
)
def test_bad_overrides_are_one_line(override, words):
    with pytest.raises(DimoError) as caught:
        load_recipe(DistillRecipe, "digits", [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


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
        load_recipe(DistillRecipe, str(path))
    assert words in str(caught.value)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(DimoError, match="did you mean 'digits-full'"):
        load_recipe(DistillRecipe, "digits-ful")
    with pytest.raises(DimoError, match="no recipe file"):
        load_recipe(DistillRecipe, "nowhere.toml")


def test_learning_rate_is_a_function_of_the_step():
    recipe = load_recipe(
        DistillRecipe, "digits", ["steps=110", "lr_warmup_steps=10", "lr_schedule=linear"]
    )
    factors = [recipe.learning_rate_factor(step) for step in (0, 4, 10, 60, 109)]
    assert factors == pytest.approx([0.1, 0.5, 1.0, 0.5, 0.01])
