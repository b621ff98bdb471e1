"""The embedded extractor and tokenizer: what they are, and that their recipes make them."""

import pytest
import torch

from bench.features.small import DigitsCNN, train_digits_cnn
from bench.images.codec import to_uint8
from dimo.errors import DimoError
from dimo.models import digits
from dimo.models.digits import DigitsTokenizer
from dimo.weights.catalog import ASSETS
from dimo.weights.files import load_metadata
from dimo.zoo.loading import load_teacher


@pytest.fixture(scope="module")
def data():
    return digits.load()


def test_the_data_are_the_real_digits(data):
    images, labels = data
    assert images.shape == (1797, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert int(images.max()) == 255
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_training_learns_to_generalise(data):
    images, labels = data
    model = train_digits_cnn(
        (images[:1500], labels[:1500]),
        steps=150,
        batch_size=128,
        learning_rate=lambda step: 2e-3,
        weight_decay=0.01,
        label_smoothing=0.1,
        pixel_noise=12.0,
        shift_probability=0.3,
        seed=0,
    )
    with torch.inference_mode():
        outputs = model(images[1500:])
    assert outputs["features"].shape == (297, DigitsCNN.feature_dim)
    assert (outputs["logits"].argmax(1) == labels[1500:]).float().mean() > 0.85


def test_the_tokenizer_reconstructs(data):
    images, _ = data
    tokenizer = load_teacher("digits", device=torch.device("cpu")).tokenizer
    tokens = tokenizer.encode(images)
    assert tokens.shape == (1797, 16)
    assert len(tokens.unique()) == tokenizer.codebook_size
    again = to_uint8(tokenizer.decode(tokens), "round")
    error = (again.float() - images.float()).square().mean().sqrt()
    assert error < 13  # grey levels of 255
    assert torch.equal(tokenizer.encode(again), tokens)


def test_decoding_places_each_patch(data):
    tokenizer = DigitsTokenizer(codebook_size=16)
    tokenizer.codebook.copy_(torch.arange(64).view(16, 4) / 63)
    decoded = tokenizer.decode(torch.arange(16)[None])[0, 0]
    assert decoded[0, :4].tolist() == pytest.approx(
        [x / 63 * 2 - 1 for x in (0, 1, 4, 5)], abs=1e-6
    )
    assert decoded[1, :2].tolist() == pytest.approx([x / 63 * 2 - 1 for x in (2, 3)], abs=1e-6)
    assert decoded[7, 7] == 1


def test_other_images_are_refused():
    with pytest.raises(DimoError, match="uint8"):
        DigitsTokenizer().encode(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("name", ["digits-teacher", "digits-tokenizer", "digits-cnn"])
def test_shipped_weights_carry_their_recipe(name):
    provenance = load_metadata(ASSETS / f"{name}.safetensors")
    assert 'kind = "' in provenance["recipe"]
    assert "1,797" in provenance["data"]


def test_shipped_weights_are_small():
    found = {p: p.stat().st_size for p in ASSETS.rglob("*.safetensors")}
    generators = {p for p in found if "scenes-dimo" in p.parts} | {
        ASSETS / f"scenes-{part}.safetensors" for part in ("teacher", "tokenizer")
    }
    assert sum(found[p] for p in generators) <= 8_000_000
    sizes = {p: size for p, size in found.items() if p not in generators}
    student = sum(size for p, size in sizes.items() if p.name == "student.safetensors")
    assert student <= 4 * 2**20
    assert sum(sizes.values()) - student <= 5 * 2**20
