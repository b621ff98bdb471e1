"""What a tokenizer loses: PSNR, SSIM and codebook use against plain float64 sums."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from bench.metrics import psnr, ssim
from bench.metrics.base import bootstrap_interval
from bench.metrics.reconstruction import (
    Reconstruction,
    compare,
    score_perplexity,
    score_psnr,
    score_ssim,
    score_usage,
)
from bench.metrics.scores import load_comparisons
from bench.protocol import load_protocol, protocol_sha256, protocol_text, validate_file
from dimo.errors import DimoError

NAMES = ("psnr", "ssim", "lpips", "codebook_usage", "codebook_perplexity")


def made(count=70, size=(14, 13), codebook_size=16):
    """Random images (more than a batch), some noise as loss, and ids of which one is never used."""
    rng = np.random.RandomState(0)
    original = rng.randint(0, 256, (count, 3, *size))
    decoded = np.clip(original + rng.randint(-30, 31, original.shape), 0, 255)
    tokens = np.minimum(rng.geometric(0.3, (count, 6)) - 1, codebook_size - 2)
    bytes_ = [torch.tensor(images, dtype=torch.uint8) for images in (original, decoded)]
    return Case(*bytes_, torch.tensor(tokens), codebook_size)


@dataclass
class Case:
    """A set in memory."""

    original: torch.Tensor
    decoded: torch.Tensor
    tokens: torch.Tensor
    codebook_size: int

    def scored(self, score):
        images = {"original": self.original, "decoded": self.decoded}
        names = {score_psnr: ["psnr"], score_ssim: ["ssim"]}.get(score, [])
        functions = load_comparisons(names, None).items()
        values = {name: compare(function, **images) for name, function in functions}
        return score(Reconstruction(self.tokens, self.codebook_size, values))


def slow_ssim(a, b):
    """Wang et al., equation 13, window by window in float64, of `[C, H, W]`."""
    offsets = np.arange(11) - 5.0
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        for top in range(x.shape[0] - 10):
            for left in range(x.shape[1] - 10):
                p, q = (z[top : top + 11, left : left + 11] for z in (x, y))
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                both = (window * (p - mp) * (q - mq)).sum()
                above = (2 * mp * mq + c1) * (2 * both + c2)
                values.append(above / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.mean(values)


def test_psnr_and_ssim_equal_plain_sums():
    case = made()
    pairs = list(zip(case.original.numpy(), case.decoded.numpy(), strict=True))
    errors = [np.square(a.astype(np.float64) - b).mean() for a, b in pairs]
    found = psnr(original=case.original, decoded=case.decoded)
    np.testing.assert_allclose(found, 10 * np.log10(255**2 / np.array(errors)), atol=1e-9)
    found = ssim(original=case.original, decoded=case.decoded)
    np.testing.assert_allclose(found, [slow_ssim(a, b) for a, b in pairs], atol=1e-9)


def test_known_values():
    """What scikit-image 0.26 gives for these images (its SSIM as `ssim` says)."""
    row = torch.arange(16)
    a = ((row[:, None] * 37 + row[None] * 91) % 256).to(torch.uint8)[None, None]
    b = (a // 32) * 32
    assert psnr(original=a, decoded=b)[0] == pytest.approx(23.189257668494676, abs=1e-9)
    assert ssim(original=a, decoded=b)[0] == pytest.approx(0.9845313021175155, abs=1e-9)


def test_ends_of_the_scales():
    case = made()
    same = replace(case, decoded=case.original)
    assert same.scored(score_ssim).value == pytest.approx(1, abs=1e-12)
    assert same.scored(score_psnr).value == pytest.approx(10 * np.log10(255**2 * 3 * 14 * 13))
    one = case.original.clone()
    one[:, 0, 0, 0] ^= 1  # off by one in one value: the same as no difference
    assert replace(case, decoded=one).scored(score_psnr).value == same.scored(score_psnr).value
    every = replace(case, tokens=torch.arange(16).repeat(5, 2))
    numbers = [every.scored(score).value for score in (score_usage, score_perplexity)]
    assert numbers == [1, pytest.approx(16)]
    single = replace(case, tokens=torch.full((5, 2), 3))
    assert [single.scored(score).value for score in (score_usage, score_perplexity)] == [1 / 16, 1]


def test_codebook_numbers_and_their_contributions():
    """The jackknife of usage, image by image; the derivative of perplexity by finite weights."""
    case = made(count=30)
    tokens = case.tokens.numpy()

    def usage(rows):
        return len(np.unique(tokens[rows])) / 16

    def perplexity(weights):
        counts = sum(w * np.bincount(t, minlength=16) for w, t in zip(weights, tokens, strict=True))
        p = counts[counts > 0] / counts.sum()
        return np.exp(-(p * np.log(p)).sum())

    found, everything = case.scored(score_usage), np.arange(30)
    assert found.value == pytest.approx(usage(everything))
    lost = [found.value - usage(np.delete(everything, i)) for i in everything]
    np.testing.assert_allclose(found.contributions, 29 * np.array(lost), atol=1e-12)
    found = case.scored(score_perplexity)
    assert found.value == pytest.approx(perplexity(np.ones(30)), abs=1e-9)
    step = 1e-6
    slopes = [(perplexity(np.ones(30) + step * (everything == i)) - found.value) for i in range(30)]
    centred = found.contributions - found.contributions.mean()
    np.testing.assert_allclose(centred / 30, np.array(slopes) / step, atol=1e-4)
    for score in map(case.scored, (score_usage, score_perplexity, score_psnr, score_ssim)):
        interval = bootstrap_interval(
            score.contributions, point=score.value, n_bootstrap=99, seed=0
        )
        assert interval.low <= score.value <= interval.high
        assert interval.low < interval.high


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoded": torch.zeros(70, 3, 14, 12, dtype=torch.uint8)}, "the same .N, C, H, W."),
        ({"decoded": torch.zeros(70, 3, 14, 13)}, "allowed: uint8"),
    ],
)
def test_images_that_do_not_fit(change, message):
    for score in (score_psnr, score_ssim):
        with pytest.raises(DimoError, match=message):
            replace(made(), **change).scored(score)


def test_ids_outside_of_the_codebook_and_small_images():
    for score in (score_usage, score_perplexity):
        with pytest.raises(DimoError, match=r"token ids are 0 to \d+; allowed: 0 to 3"):
            replace(made(), codebook_size=4).scored(score)
    with pytest.raises(DimoError, match="images of 8 x 20 have no SSIM"):
        made(size=(8, 20)).scored(score_ssim)


def listing(path, protocol, names):
    """A shipped protocol that lists these metrics as supplementary ones."""
    more = "".join(
        f'[[metrics]]\nname = "{name}"\nhigher_is_better = {str(name != "lpips").lower()}\n'
        "supplementary = true\n\n"
        for name in names
    )
    path.write_text(protocol_text(protocol).replace("[uncertainty]", f"{more}[uncertainty]"))
    return path


def test_which_protocols_may_list_them(tmp_path):
    for names, message in ((NAMES, "'ssim'.*of 11 x 11"), (["lpips"], "'lpips'.*of 32 x 32")):
        path = listing(tmp_path / "digits.toml", "digits", names)
        with pytest.raises(DimoError, match=f"{message} pixels or more"):
            validate_file(path)
    small = [name for name in NAMES if name not in ("ssim", "lpips")]
    others = validate_file(listing(path, "digits", small))
    assert protocol_sha256(others) == protocol_sha256(load_protocol("digits"))
    named = validate_file(listing(tmp_path / "scenes-geneval.toml", "scenes-geneval", NAMES))
    assert [metric.name for metric in named.metrics][-5:] == list(NAMES)
    named = validate_file(listing(tmp_path / "imagenet256-adm.toml", "imagenet256-adm", NAMES))
    assert protocol_sha256(named) == protocol_sha256(load_protocol("imagenet256-adm"))
    path = listing(tmp_path / "coco30k.toml", "coco30k", ["psnr"])
    with pytest.raises(DimoError, match=r"'psnr' needs real images, .*with prompts: scenes-held"):
        validate_file(path)
    text = protocol_text("digits")
    head, tail = text[: text.index("[[metrics]]")], text[text.index("[uncertainty]") :]
    path = tmp_path / "digits.toml"
    path.write_text(f'{head}[[metrics]]\nname = "psnr"\nhigher_is_better = true\n\n{tail}')
    with pytest.raises(DimoError, match="must name one that other rows have, too"):
        validate_file(path)
