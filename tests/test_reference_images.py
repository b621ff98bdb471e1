"""Rows "Real data" and "Tokenizer reconstruction" of images in a folder: `--reference-images`."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from bench.features.references import new_protocol, reference_sha256
from bench.images.codec import encode_png
from bench.protocol import Metric, Reference, draft_protocol
from bench.protocol.catalog import ANY, BUNDLED_REFERENCES
from bench.records.store import load_all
from bench.rows.generate import Reconstructed
from bench.suites.base import Assets, load_suite
from dimo.engine.distributed import Runtime
from dimo.errors import DimoError
from dimo.models import digits
from dimo.zoo.loading import load

CPU = torch.device("cpu")
LOSSES = ("psnr", "codebook_usage", "codebook_perplexity")
BENCH = ("bench", "--teacher", "digits", "--steps", "1", "--protocol")


def write(folder, count=200, scale=1, classes=False):
    """The first digits as PNGs, each pixel `scale` times as wide and high; labels beside them."""
    images, labels = digits.load()
    lines = ["file,label"]
    for i, (image, label) in enumerate(zip(images[:count], labels.tolist(), strict=False)):
        name = f"{label}/{i:04d}.png" if classes else f"{i:04d}.png"
        pixels = image.permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode_png(pixels))
        lines.append(f"{name},{label}")
    if not classes:
        (folder / "labels.csv").write_text("\n".join(lines))
    return folder


def make_protocol(photos, **options):
    options = {"weights": None, "allow_code": False, "num_images": 200, **options}
    toml = photos.with_suffix(".toml")
    return new_protocol([photos], toml, extractor="digits-cnn", runtime=Runtime(CPU), **options)


def rows_of(protocol, *folders, tokenizer=None, warn=print, **assets):
    """The suite, and its reference rows of images in folders."""
    given = Assets(reference_images=folders, **assets)
    suite = load_suite(protocol, Runtime(CPU, warn=warn), given)
    return suite, suite.reference_rows(tokenizer or load("digits", device=CPU))


@pytest.fixture(scope="module")
def loaded():
    return load("digits", device=CPU)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with one folder per class; its protocol and reference are beside it."""
    return write(tmp_path_factory.mktemp("own") / "photos", classes=True)


@pytest.fixture(scope="module")
def protocol(photos):
    return make_protocol(photos)


def test_rows_of_a_folder_equal_those_of_bundled_images(tmp_path, monkeypatch, loaded):
    images, labels = (part[:200] for part in digits.load())
    monkeypatch.setattr(digits, "few", lambda: (images, labels), raising=False)
    monkeypatch.setitem(BUNDLED_REFERENCES, "digits-few", "dimo.models.digits:few")
    drafted = make_protocol(write(tmp_path / "photos"))
    reference = Reference("digits-few", reference_sha256(images), 200)
    bundled = dataclasses.replace(drafted, reference=reference)
    found = []
    for protocol, folders in ((drafted, [tmp_path / "photos"]), (bundled, [])):
        suite, rows = rows_of(protocol, *folders, tokenizer=loaded)
        found.append([suite.measure(row).record for row in rows])
    for own, shipped in zip(*found, strict=True):
        assert list(own.metrics) == list(shipped.metrics)
        for name, value in shipped.metrics.items():
            given = own.metrics[name]
            assert (given.value, given.low, given.high) == pytest.approx(
                (value.value, value.low, value.high), abs=1e-9
            ), name
        assert own.evidence.images == (str(tmp_path / "photos"),)
        assert own.evidence.notes[-1].endswith(": those of the reference")
        assert shipped.evidence.images == shipped.evidence.notes == ()
    real, lost = (tuple(record.metrics) for record in found[0])
    assert lost == (*real, *LOSSES)


def test_protocols_list_what_the_images_are_large_enough_for():
    given = {"num_classes": 10, "num_real": 100, "extractor": "inception"}
    for side, expected in ((8, LOSSES), (256, ("psnr", "ssim", *LOSSES[1:]))):
        made = draft_protocol("photos", resolution=(side, side), **given)
        assert tuple(m.name for m in made.metrics if m.supplementary) == expected


def test_photos_are_cropped_as_those_of_the_reference(tmp_path, protocol, photos, loaded):
    """Pixels that were doubled are what they were after ADM's rule."""
    large = write(tmp_path / "large", scale=2, classes=True)
    cropped = make_protocol(large, side=8)
    suite, rows = rows_of(cropped, large, tokenizer=loaded)
    other, others = rows_of(protocol, photos, tokenizer=loaded)
    values = [s.measure(r[1]).record.metrics for s, r in ((suite, rows), (other, others))]
    assert values[0] == values[1]
    assert ", cropped to 8 (adm): those of the reference" in rows[0].images.notes[0]


def test_a_reference_that_names_no_images_takes_any(tmp_path, protocol, photos, loaded):
    """As ADM's file; the record has their hash, and rows of other images are not these rows."""
    with np.load(protocol.reference_file) as file:
        arrays = {name: file[name] for name in file.files if name != "provenance"}
    np.savez(tmp_path / "adm.npz", **arrays)
    any_reference = dataclasses.replace(protocol.reference, sha256=ANY)
    protocol, said = dataclasses.replace(protocol, reference=any_reference), []
    options = {"reference": tmp_path / "adm.npz", "tokenizer": loaded, "warn": said.append}
    suite, rows = rows_of(protocol, write(tmp_path / "large", scale=2, classes=True), **options)
    assert "cropped to 8 (adm): the reference does not name its images" in said[0]
    record = suite.measure(rows[1]).record
    assert record.evidence.notes == (said[0],)
    assert suite.is_same(record, rows[1])
    more = write(tmp_path / "more", count=210, classes=True)
    assert not suite.is_same(record, rows_of(protocol, more, **options)[1][1])


def test_an_interrupted_row_goes_on_where_it_was(tmp_path, monkeypatch, protocol, photos, loaded):
    reads, read = [], Reconstructed.read
    monkeypatch.setattr(Reconstructed, "read", lambda s, rows: reads.append(rows) or read(s, rows))
    whole = rows_of(protocol, photos, tokenizer=loaded)
    whole = whole[0].measure(whole[1][1]).record
    assert [*map(len, reads)] == [200]

    def interrupt(what, finished, total, unit):
        if unit == "images" and finished > 90 and what == Reconstructed.caption:
            raise KeyboardInterrupt

    for progress, done in ((interrupt, [32, 64]), (lambda *args: None, [64, 40])):
        reads.clear()
        assets = Assets(cache=tmp_path, reference_images=(photos,))
        suite = load_suite(protocol, Runtime(CPU, progress=progress), assets, batch_size=64)
        row = suite.reference_rows(loaded)[1]
        if progress is interrupt:
            with pytest.raises(KeyboardInterrupt):
                suite.measure(row)
        else:
            record = suite.measure(row).record
        assert [*map(len, reads)] == done
    assert (record.metrics, record.evidence) == (whole.metrics, whole.evidence)
    suite.forget()
    assert not list((tmp_path / "rows").iterdir())


@pytest.mark.slow
def test_two_ranks_make_the_same_rows(dimo, run_two_ranks, tmp_path, protocol, photos):
    options = (*BENCH, photos.with_suffix(".toml"), "--reference-images", photos, "--results")
    dimo(*options, "one")
    run_two_ranks(*options, "two", cwd=tmp_path)
    one, two = (load_all(tmp_path / name)[0] for name in ("one", "two"))
    assert [(r.method.name, r.metrics, r.evidence) for r in one] == [
        (r.method.name, r.metrics, r.evidence) for r in two
    ]


def test_bench_and_verify(dimo, tmp_path, protocol, photos):
    """The rows are on record and can be made again."""
    options = (*BENCH, photos.with_suffix(".toml"), "--reference-images", photos, "--results")
    dimo(*options, "one")
    one = load_all(tmp_path / "one")[0]
    assert len(one) == 3
    _, said = dimo(*options, "one")
    assert "3 of 3 rows are on record" in said
    (lost,) = (r for r in one if r.method.name == "Tokenizer reconstruction")
    verify = ("verify", lost.run_id, "--results", "one", "--protocol", photos.with_suffix(".toml"))
    _, problem = dimo(*verify, code=2)
    assert f"is a set of images ({photos}), which no network makes again" in problem
    found = json.loads(dimo(*verify, "--images", photos, "--json")[0])
    assert found["equal"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no images at nowhere: it does not exist"),
        (["empty"], "empty holds no image"),
        (["wide"], "size 16 x 16 in 200 images .*; allowed: 8 x 8 .* give the images that .*npz"),
        (["few"], "few: 190 images with sha256 .* was made of those of .*photos with "),
        (["nine"], "nine: 9 classes; allowed under protocol 'photos': 10; give one folder per"),
        (["nested"], "images are not in a folder of their class"),
        (["few", "--num-images", "210"], "few is not used without rows for real data, as in a qu"),
        (["few", "--protocol", "digits"], "few is not used under 'digits', whose real images come"),
        (["few", "--teacher", "scenes", "--protocol", "scenes-geneval"], "few is not used under"),
    ],
)
def test_what_does_not_fit_is_one_line(dimo, tmp_path, protocol, photos, arguments, message):
    folder = arguments[0]
    if folder == "empty":
        (tmp_path / folder).mkdir()
    elif folder == "nested":
        write(tmp_path / folder / "below", classes=True)
    elif folder != "nowhere":
        write(tmp_path / folder, 190 if folder == "few" else 200, 1 + (folder == "wide"), True)
    if folder == "nine":
        for path in (tmp_path / folder / "9").iterdir():
            path.rename(tmp_path / folder / "8" / path.name)
        (tmp_path / folder / "9").rmdir()
    options = (*BENCH, photos.with_suffix(".toml"), "--reference-images", *arguments)
    _, said = dimo(*options, code=2)
    errors = said[said.index("error: ") :]
    assert re.search(message, errors), errors
    assert not (tmp_path / "results").exists()


def test_labels_and_numbers_that_metrics_need(tmp_path, protocol, loaded):
    """A flat folder has no labels; few images no neighbours."""
    flat = write(tmp_path / "flat")
    (flat / "labels.csv").unlink()
    anything = dataclasses.replace(protocol.reference, sha256=ANY)
    with np.load(protocol.reference_file) as file:
        np.savez(tmp_path / "adm.npz", **{n: file[n] for n in file.files if n != "provenance"})
    protocol = dataclasses.replace(protocol, reference=anything)
    given = {"reference": tmp_path / "adm.npz", "tokenizer": loaded}
    suite, rows = rows_of(protocol, flat, **given)
    assert suite.measure(rows[0]).record.evidence.labels_sha256 == ""
    accuracy = Metric("class_accuracy", True, {})
    asking = dataclasses.replace(protocol, metrics=(*protocol.metrics, accuracy))
    with pytest.raises(DimoError, match=r"flat: images without labels, which class_accuracy needs"):
        rows_of(asking, flat, **given)
    for path in sorted(flat.iterdir())[3:]:
        path.unlink()
    with pytest.raises(DimoError, match=r"flat: no .*; give more images"):
        rows_of(protocol, flat, **given)
