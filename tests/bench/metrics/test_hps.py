"""Averages of HPSv2's benchmark, and the cosines of CLIP score: closed forms."""

import numpy as np
import pytest

from bench.metrics.per_image import STYLES, cosines, hps_summary, scaled_cosines
from dimo.errors import DimoError


def scores(count=800):
    rng = np.random.default_rng(0)
    return {style: 27 + number + rng.normal(size=count) for number, style in enumerate(STYLES)}


def test_means_by_style_and_deviation_of_groups():
    """Ten groups of 80 consecutive prompts; the average is over all 3,200 images."""
    given = scores()
    found = hps_summary(dict(reversed(given.items())))
    assert tuple(found.styles) == STYLES
    for style, array in given.items():
        groups = [array[start : start + 80].mean() for start in range(0, 800, 80)]
        assert found.styles[style].mean == pytest.approx(array.mean())
        assert found.styles[style].std == pytest.approx(np.std(groups))
    assert found.average == pytest.approx(np.mean(list(given.values())))


def test_groups_are_consecutive():
    steps = np.repeat(np.arange(10.0), 80)
    found = hps_summary(dict.fromkeys(STYLES, steps)).styles["photo"]
    assert (found.mean, found.std) == (pytest.approx(4.5), pytest.approx(np.arange(10).std()))
    mixed = hps_summary(dict.fromkeys(STYLES, np.tile(np.arange(10.0), 80))).styles["photo"]
    assert (mixed.mean, mixed.std) == (pytest.approx(4.5), 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("photo"), "needed: anime, concept-art, paintings, photo"),
        (lambda s: s.update(drawbench=np.zeros(800)), "styles are anime, concept-art, drawbench"),
        (lambda s: s.update(photo=np.zeros(799)), r"'photo' has scores of shape \[799\]"),
        (lambda s: s.update(photo=np.full(800, np.nan)), "800 finite numbers"),
    ],
)
def test_an_incomplete_benchmark_is_one_error(change, said):
    given = scores()
    change(given)
    with pytest.raises(DimoError, match=said):
        hps_summary(given)


def test_prompts_split_into_groups():
    assert hps_summary(scores(20), prompts_per_style=20).average > 27
    with pytest.raises(DimoError, match="25 is not a multiple of 10"):
        hps_summary(scores(25), prompts_per_style=25)


def test_cosines_of_identical_opposite_and_orthogonal_embeddings():
    images = np.array([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0]], dtype=np.float32)
    texts = np.array([[6.0, 8.0], [-3.0, -4.0], [-4.0, 3.0]], dtype=np.float32)
    np.testing.assert_allclose(cosines(images=images, texts=texts), [1, -1, 0], atol=1e-7)
    np.testing.assert_allclose(scaled_cosines(images=images, texts=texts), [100, 0, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("images", "texts", "said"),
    [
        (np.ones((2, 3)), np.ones((3, 3)), "2 image embeddings do not fit 3"),
        (np.ones((2, 3)), np.ones((2, 4)), "text embeddings have dimension 4"),
        (np.ones((2, 3)), np.zeros((2, 3)), "embedding 0 is zero"),
        (np.full((2, 3), np.inf), np.ones((2, 3)), "image embeddings"),
    ],
)
def test_embeddings_that_do_not_fit_are_one_error(images, texts, said):
    with pytest.raises(DimoError, match=said):
        cosines(images=images, texts=texts)
