"""`bench.run` and the other functions of the package: what the commands do, from Python."""

import sys

import numpy as np
import pytest
import torch

import bench
from bench.protocol import protocol_text
from dimo.errors import DimoError
from dimo.models import digits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A protocol of few images."""
    folder = tmp_path_factory.mktemp("api")
    text = protocol_text("digits").replace('name = "digits"', 'name = "few"')
    for old, new in (("num_images = 5000", "num_images = 300"), ("n_bootstrap = 200", "n_b = 20")):
        assert old in text
        text = text.replace(old, new.replace("n_b ", "n_bootstrap "))
    (folder / "few.toml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def table(folder):
    before = list(sys.argv), torch.get_num_threads(), torch.get_default_dtype()
    table = bench.run(
        ["digits@1,2", "mine=digits-dimo"],
        protocol=folder / "few.toml",
        tune={"temperature": [0.8, 1.0]},
        results=folder / "results",
        device="cpu",
    )
    assert (list(sys.argv), torch.get_num_threads(), torch.get_default_dtype()) == before
    return table


def test_run_scores_every_row(table, folder):
    assert list(table["name"]) == [
        "Real data",
        "Tokenizer reconstruction",
        "MaskGIT",
        "MaskGIT",
        "mine",
    ]
    assert table["num_steps"].tolist()[2:] == [1, 2, 1]
    assert table["fid"][0] < table["fid"][1] < table["fid"][2:].min()
    assert table["images_per_second"].isna().tolist() == [True, True, False, False, False]
    pictures = {path.stem for path in (folder / "results" / "pictures").iterdir()}
    assert pictures == set(table["run_id"][2:])


def test_records_are_stored_and_compared(table, folder):
    records = bench.load_results(folder / "results")
    assert [record.run_id for record in records] == table["run_id"].tolist()
    student = records[-1]
    assert student.command.startswith("bench.run(['digits@1,2', 'mine=digits-dimo'], protocol=")
    assert student.method.tuning is not None
    assert student.format == 2
    differences = bench.compare(
        records[2],
        student.run_id,
        protocol=folder / "few.toml",
        results=folder / "results",
    )
    fid = next(d for d in differences if d.metric == "fid")
    assert fid.first - fid.second == pytest.approx(table["fid"][2] - table["fid"][4])
    assert fid.better == "second"


def test_the_protocol_is_the_first_models(tmp_path):
    table = bench.run(["digits-dimo"], num_images=50, results=tmp_path, device="cpu")
    assert table["off_protocol"].tolist() == [True]
    (record,) = bench.load_results(tmp_path)
    assert (record.protocol.name, record.num_images) == ("digits", 50)
    assert record.command == "bench.run(['digits-dimo'], protocol='digits', num_images=50)"
    with pytest.raises(DimoError, match="protocol 'digits' is for 8 x 8 images"):
        bench.run(["digits-dimo", "scenes-dimo"], results=tmp_path)


def test_evaluate_scores_files(folder):
    images, labels = digits.load()
    order = np.argsort(labels.numpy() % 10, kind="stable").reshape(-1)
    rows = [order[labels.numpy()[order] == i % 10][i // 10] for i in range(300)]
    np.savez(
        folder / "set.npz",
        arr_0=images[rows].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy(),
        arr_1=labels[rows].numpy(),
    )
    record = bench.evaluate(
        folder / "set.npz", protocol=folder / "few.toml", results=folder / "sets", device="cpu"
    )
    assert record.method.name == "set.npz"
    assert record.metrics["precision"].value == 1
    assert record.command.startswith("bench.evaluate(")
    assert bench.load_results(folder / "sets") == [record]


def test_left_out_files_are_warned_about(tmp_path):
    (tmp_path / "half.json").write_text("{")
    with pytest.warns(UserWarning, match="half.json: not valid JSON"):
        assert bench.load_results(tmp_path) == []


def test_models_and_protocols_that_do_not_fit_are_refused(tmp_path):
    for models, protocol, words in (
        (["digits@1"], "imagenet256-adm", "is for 256 x 256 images"),
        ([], "digits", "there is nothing to score"),
    ):
        with pytest.raises(DimoError, match=words):
            bench.run(models, protocol=protocol, results=tmp_path)
    assets = bench.Assets(prompts="x")
    with pytest.raises(DimoError, match="--prompts x is not used under 'digits'"):
        bench.evaluate("set", protocol="digits", assets=assets, results=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_package_names_what_it_offers():
    assert set(bench.__all__) <= set(dir(bench))
    for name in bench.__all__:
        assert getattr(bench, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bench.nothing
