"""HPS against HPSv2's own CLIP; its versions, images and prompts; CLIP score."""

import gzip
import json

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load

from bench.features import extraction
from bench.features.clip import load_pairs, make_pairs
from bench.features.resize import central_square
from bench.metrics.base import bootstrap_interval
from bench.metrics.per_image import STYLES
from bench.suites.captions import CLIPScorer
from bench.suites.hps import HPS_VERSIONS, HPSScorer, hps_images, hps_prompts, load_hps
from dimo.errors import DimoError

CASE = "hpsv2_tiny_clip"
CPU = torch.device("cpu")
RULES = {"pre": "tensor-antialias", "pre_noaa": "tensor-noaa"}


@pytest.fixture(scope="module")
def config(golden):
    return json.loads((golden / f"{CASE}.config.json").read_text())


@pytest.fixture(scope="module")
def state(golden):
    return load(gzip.decompress((golden / f"{CASE}.weights.safetensors.gz").read_bytes()))


@pytest.fixture(scope="module")
def data(golden):
    with np.load(golden / f"{CASE}.data.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


@pytest.fixture(scope="module")
def pictures(data):
    return [data[f"image_{number}"] for number in range(3)]


@pytest.fixture
def pairs(state, config):
    return make_pairs(state, "tensor-antialias", config["model_cfg"], name="tiny")


@pytest.fixture
def small_h14(monkeypatch, config):
    """ViT-H-14 at the size of the golden network."""
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config["model_cfg"])


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_preprocessing_equals_the_official_one(state, config, data, pictures, kind, number):
    pairs = make_pairs(state, RULES[kind], config["model_cfg"], name="tiny")
    found = pairs.preprocess(pictures[number])
    np.testing.assert_allclose(found, data[f"{kind}_{number}"], atol=1e-5)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_preprocessing_at_full_size(pairs, data, pictures, number):
    pairs.side = 224
    for kind, at in (("pre", 0), ("pre_noaa", 3)):
        pairs.preprocessing = RULES[kind]
        found = pairs.preprocess(pictures[number])
        part = data[f"{kind.replace('pre', 'pre224')}_{number}_sub8"]
        np.testing.assert_allclose(found[:, ::8, ::8], part, atol=1e-5)
        whole = found.double()
        sums = [whole.sum(), whole.abs().sum(), whole.square().sum()]
        np.testing.assert_allclose(sums, data[f"pre224_{number}_stats"][at : at + 3], rtol=1e-5)


def test_pillows_resize_is_close_to_the_antialiased_and_far_from_the_other(pictures):
    """Which explains why scores depend on the rule: it shrinks images."""
    rules = ("pil", "tensor-antialias", "tensor-noaa")
    pil, antialiased, other = (central_square(pictures[0], 32, rule) for rule in rules)
    assert (pil - antialiased.clamp(0, 1)).abs().mean() < 0.003  # bytes are rounded twice
    assert (pil - other).abs().mean() > 0.03


def test_tokens_embeddings_and_scores_equal_the_official_ones(pairs, data, config, pictures):
    prompts = config["prompts"]
    assert np.array_equal(pairs.tokenizer(prompts), data["tokens"])
    np.testing.assert_allclose(pairs.texts(prompts), data["text_features"], atol=1e-5)
    np.testing.assert_allclose(pairs.images(pictures), data["image_features"], atol=1e-5)
    scorer = HPSScorer(pairs, "v2.0", "")
    for start in (0, 3):
        found = scorer.score(pictures, prompts[start : start + 3])
        expected = 100 * np.diag(data["scores"][:, start : start + 3])
        np.testing.assert_allclose(found, expected, atol=1e-3)  # 1e-5 of the cosine
        assert abs(found - expected).max() / 100 < 1e-5


def test_batches_do_not_change_scores(pairs, config, pictures, monkeypatch):
    prompts = config["prompts"][:3]
    whole = HPSScorer(pairs, "v2.0", "").score(pictures, prompts)
    monkeypatch.setattr(extraction, "FORWARD_BATCH", 2)
    np.testing.assert_allclose(
        HPSScorer(pairs, "v2.0", "").score(iter(pictures), prompts), whole, atol=1e-4
    )


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_checkpoint_of_the_published_layout(small_h14, state, config, tmp_path, wrapped):
    path = tmp_path / HPS_VERSIONS["v2.1"]
    torch.save({"state_dict": state, "epoch": 1} if wrapped else state, path)
    arguments = {"preprocessing": "pil", "sha256": "any", "device": CPU}
    scorer = load_hps(path, version="v2.1", **arguments)
    assert (scorer.version, len(scorer.sha256)) == ("v2.1", 64)
    again = load_hps(path, version="v2.1", **{**arguments, "sha256": scorer.sha256})
    picture = np.full((40, 50, 3), 200, np.uint8)
    assert again.score([picture], ["a"]) == scorer.score([picture], ["a"])
    with pytest.raises(DimoError, match=r"is the checkpoint of HPS v2\.1, but v2\.0 is declared"):
        load_hps(path, version="v2.0", **arguments)
    declared = {**arguments, "sha256": "0" * 64}
    with pytest.raises(DimoError, match=r"000000000000\.\.\. is declared for HPS v2\.1"):
        load_hps(path, version="v2.1", **declared)

    renamed = path.rename(tmp_path / "hps.pt")
    with pytest.raises(DimoError, match="may be any version of HPS"):
        load_hps(renamed, version="v2.0", **arguments)
    named = {**arguments, "sha256": scorer.sha256}
    assert load_hps(renamed, version="v2.1", **named).version == "v2.1"


def test_what_is_no_hps_is_refused(small_h14, state, tmp_path):
    arguments = {"preprocessing": "pil", "sha256": "any", "device": CPU}
    path = tmp_path / HPS_VERSIONS["v2.0"]
    with pytest.raises(DimoError, match=r"weights fetch hps-v2\.0"):
        load_hps(path, version="v2.0", **arguments)
    torch.save({"state_dict": {**state, "more": torch.zeros(1)}}, path)
    with pytest.raises(DimoError, match=r"1 unexpected \(more\)"):
        load_hps(path, version="v2.0", **arguments)
    torch.save({"state_dict": state}, path)
    with pytest.raises(DimoError, match="unknown preprocessing 'bicubic'"):
        load_hps(path, version="v2.0", **{**arguments, "preprocessing": "bicubic"})
    with pytest.raises(DimoError, match="unknown HPS version 'v2'"):
        load_hps(path, version="v2", **arguments)


def test_images_that_cannot_be_scored_are_refused(pairs, pictures):
    scorer = HPSScorer(pairs, "v2.0", "")
    with pytest.raises(DimoError, match="3 image embeddings do not fit 2"):
        scorer.score(pictures, ["a", "b"])
    with pytest.raises(DimoError, match="no prompts to score images with"):
        scorer.score([], [])
    with pytest.raises(DimoError, match=r"uint8 \[64, 64, 4\]; allowed"):
        scorer.score([np.zeros((64, 64, 4), np.uint8)], ["a"])


def test_full_size_needs_no_other_keys():
    """HPSv2's own ViT-H-14 and open_clip's have the same 686 keys."""
    with torch.device("meta"):
        network = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    assert len(network.state_dict()) == 686
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(986.1e6, rel=1e-4)


def make_images(folder, count=2, suffix=".png"):
    for style in STYLES:
        (folder / style).mkdir(parents=True)
        for number in range(count):
            (folder / style / f"{number:05d}{suffix}").touch()


def test_images_by_style(tmp_path):
    make_images(tmp_path)
    (tmp_path / "photo" / "00001.png").rename(tmp_path / "photo" / "00001.jpg")
    found = hps_images(tmp_path, prompts_per_style=2)
    assert list(found) == list(STYLES)
    assert [path.name for path in found["photo"]] == ["00000.png", "00001.jpg"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "anime" / "00001.png").unlink(), r"lacks anime/00001\.png \(or \.jpg\)"),
        (lambda f: [p.unlink() for p in f.rglob("*.png")], "photo|anime/00000.* and 5 more"),
        (lambda f: (f / "anime").rename(f / "other"), "has no folder anime"),
        (lambda f: (f / "anime" / "00002.png").touch(), "1 images in excess of its 2 prompts"),
        (lambda f: (f / "anime" / "00000.jpg").touch(), r"00000\.jpg and 00000\.png; remove one"),
    ],
)
def test_images_that_are_not_whole_are_one_error(tmp_path, spoil, said):
    make_images(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DimoError, match=said):
        hps_images(tmp_path, prompts_per_style=2)


def test_prompts_by_style(tmp_path):
    for style in STYLES:
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} {n}" for n in range(800)]))
    found = hps_prompts(tmp_path)
    assert list(found) == list(STYLES)
    assert found["photo"][799] == "photo 799"
    for content, said in (
        (json.dumps(["a"] * 799), "799 prompts instead of 800"),
        (json.dumps({"a": 1}), "not a list of texts"),
        (json.dumps([" "] * 800), "not a list of texts"),
        ("[", "not valid JSON"),
    ):
        (tmp_path / "photo.json").write_text(content)
        with pytest.raises(DimoError, match=said):
            hps_prompts(tmp_path)
    (tmp_path / "anime.json").unlink()
    with pytest.raises(DimoError, match=r"anime\.json: cannot read prompts"):
        hps_prompts(tmp_path)


def test_clip_score_is_the_mean_cosine_with_the_prefixed_prompt(pairs, pictures):
    prompts = ["a cat", "a dog", "a girl"]
    found = CLIPScorer(pairs, "A photo depicts ", "cosine").score(pictures, prompts)
    texts = pairs.texts([f"A photo depicts {prompt}" for prompt in prompts])
    expected = (pairs.images(pictures) * texts).sum(1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    scaled = CLIPScorer(pairs, "A photo depicts ", "scaled").score(pictures, prompts)
    np.testing.assert_allclose(scaled, 100 * expected.clip(0), atol=1e-4)
    assert not np.allclose(found, CLIPScorer(pairs, "", "cosine").score(pictures, prompts))
    mean = float(found.mean())
    interval = bootstrap_interval(found, point=mean, n_bootstrap=200, seed=0)
    assert interval.low < mean < interval.high
    with pytest.raises(DimoError, match="unknown CLIP score scale 'percent'"):
        CLIPScorer(pairs, "", "percent")


def test_an_architecture_that_is_no_clip_is_refused(tmp_path):
    for name in ("ViT-H", "coca_ViT-B-32"):
        with pytest.raises(DimoError, match="no plain CLIP of open_clip"):
            load_pairs(tmp_path / "x.pt", name, "pil")
