"""References that users bring, and differences between rows: `dimo reference`, `dimo compare`."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from bench.features.stats import load_stats

# --- references ------------------------------------------------------------------------------


def test_a_reference_made_from_images_is_read_by_others_and_by_eval(
    dimo, samples, tmp_path, real_digits, write_folder, eval_json, any_reference
):
    pixels, labels = real_digits(200, start=20)
    write_folder(tmp_path / "real", pixels, labels)
    (tmp_path / "tiny.toml").write_text(any_reference)
    out, _ = dimo("reference", "real", "--protocol", "tiny.toml", "-o", "stats.npz")
    assert "200 images" in out
    stats = load_stats(tmp_path / "stats.npz", extractor="digits-cnn")["features"]
    assert stats.count == 200
    with np.load(tmp_path / "stats.npz") as file:
        assert file["features"].shape == (100, 64)
        assert json.loads(str(file["provenance"]))["protocol"]["name"] == "tiny"
    _, err = dimo("reference", "real", "--protocol", "tiny.toml", "-o", "stats.npz", code=2)
    assert "exists" in err
    record, _ = eval_json("samples", "--labels", "filename", "--reference", "stats.npz")
    assert record["evidence"]["nonconforming"] == []
    assert record["metrics"]["coverage"]["extra"]["ceiling"] < 0.9


def test_rows_of_two_references_do_not_share_a_table(
    dimo, samples, tmp_path, real_digits, eval_json, any_reference
):
    (tmp_path / "tiny.toml").write_text(any_reference)
    for name, start in (("one", 20), ("two", 40)):
        np.savez(tmp_path / f"{name}.npz", arr_0=real_digits(100, start=start)[0])
        arguments = ("--labels", "filename", "--reference", f"{name}.npz", "--name", name)
        eval_json("samples", *arguments)
    report, _ = dimo("report", "--protocol", "tiny.toml")
    assert report.count("Measured with") == 2


def test_adm_statistics_are_the_reference_of_frechet_distances(
    dimo, samples, tmp_path, real_digits, write_folder, eval_json, any_reference
):
    """mu and sigma of the whole training set, and some of its images, in one file."""
    pixels, labels = real_digits(200, start=20)
    write_folder(tmp_path / "real", pixels, labels)
    (tmp_path / "tiny.toml").write_text(any_reference)
    dimo("reference", "real", "--protocol", "tiny.toml", "-o", "stats.npz")
    with np.load(tmp_path / "stats.npz") as file:
        np.savez(
            tmp_path / "adm.npz",
            arr_0=pixels[:100],
            mu=file["mu"].astype("f4"),
            sigma=file["sigma"],
        )
    arguments = ("samples", "--labels", "filename", "--reference")
    images_only = eval_json(*arguments, "adm.npz")[1]
    (tmp_path / "tiny.toml").write_text(
        any_reference.replace("count = 100", "count = 100\nstatistics_count = 200")
    )
    adm = eval_json(*arguments, "adm.npz")[1]
    made = eval_json(*arguments, "stats.npz")[1]
    assert adm["fid"] == pytest.approx(made["fid"], rel=1e-5)
    assert abs(images_only["fid"] - made["fid"]) > 1e-3
    assert images_only["precision"] == adm["precision"]


def test_a_reference_of_photos_of_any_size_and_kind(dimo, tmp_path, real_digits, any_reference):
    """As ImageNet's own folder has them: JPEG, grey, CMYK, several sizes; cropped by ADM's rule."""
    pixels, _ = real_digits(100)
    folder = tmp_path / "photos" / "n01440764"
    folder.mkdir(parents=True)
    for i, image in enumerate(pixels):
        photo = Image.fromarray(image).resize((20 + i % 3, 17))
        photo.convert(("RGB", "L", "CMYK")[i % 3]).save(folder / f"{i:03d}.JPEG", format="JPEG")
    (tmp_path / "tiny.toml").write_text(any_reference)
    command = ("reference", "photos", "--recursive", "--protocol", "tiny.toml", "-o")
    for arguments, words in (
        (["a.npz"], "photos of any size and kind are taken with --centre-crop 8"),
        (["a.npz", "--centre-crop", "9"], "--centre-crop 9; allowed under protocol 'tiny', whose"),
        (["stats"], "--out stats is not an .npz file; e.g. -o stats.npz"),
        (["tiny.toml/a.npz"], "tiny.toml is a file; give a folder"),
    ):
        _, err = dimo(*command, *arguments, code=2)
        assert words in err, err
    dimo(*command, "a.npz", "--centre-crop", "8")
    with np.load(tmp_path / "a.npz") as file:
        assert json.loads(str(file["provenance"]))["images"]["crop"] == "adm 8"
    (tmp_path / "a.npz").rename(tmp_path / "A.NPZ")
    np.savez(tmp_path / "set.npz", pixels[:40])
    arguments = ("--labels", "cyclic:10", "--reference", "A.NPZ")
    _, err = dimo("eval", "set.npz", "--protocol", "tiny.toml", *arguments)
    assert "record: " in err


# --- differences -----------------------------------------------------------------------------


def test_compare_pairs_two_rows(dimo, samples, tmp_path, real_digits, write_folder):
    pixels, labels = real_digits(40)
    noise = np.random.RandomState(0).randint(0, 60, pixels.shape).astype("u1")
    write_folder(tmp_path / "noisy", np.where(pixels > 190, pixels, pixels + noise), labels)
    for folder in ("samples", "noisy"):
        dimo("eval", folder, "--protocol", "tiny.toml", "--labels", "filename")
    one, two = (next((tmp_path / "results").glob(f"*-{name}-*")) for name in ("samples", "noisy"))
    out, _ = dimo("compare", one, two, "--protocol", "tiny.toml", "--json")
    found = {entry["metric"]: entry for entry in json.loads(out)}
    assert found["fid"]["first"] < found["fid"]["second"]
    assert found["fid"]["low"] <= found["fid"]["first"] - found["fid"]["second"]
    assert found["fid"]["better"] == "first"
    out, _ = dimo("compare", one, one, "--protocol", "tiny.toml", "--json")
    for entry in json.loads(out):
        assert entry["low"] == entry["high"] == 0
        assert entry["better"] == "neither"
    out, _ = dimo("compare", one, two, "--protocol", "tiny.toml")
    assert "Difference" in out


def test_compare_refuses_rows_that_are_not_paired(dimo, samples, tmp_path):
    shutil.copytree(samples, tmp_path / "other")
    (tmp_path / "other" / "000000_0.png").rename(tmp_path / "other" / "zero_0.png")
    for folder in ("samples", "other"):
        dimo("eval", folder, "--protocol", "tiny.toml", "--labels", "filename")
    one, two = (next((tmp_path / "results").glob(f"*-{name}-*")) for name in ("samples", "other"))
    _, err = dimo("compare", one, two, "--protocol", "tiny.toml", code=2)
    assert "are not paired" in err
    (file,) = (tmp_path / "results" / "contributions").glob(
        f"{json.loads(two.read_text())['run_id']}*"
    )
    file.write_bytes(file.read_bytes()[:-1])
    _, err = dimo("compare", two, two, "--protocol", "tiny.toml", code=2)
    assert "is not what the record names" in err
    _, err = dimo("compare", "ffff", "0000", "--protocol", "tiny.toml", code=2)
    assert "0 records in results" in err
    assert "give another one (dimo results list has them), or the path" in err
