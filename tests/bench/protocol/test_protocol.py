"""Protocols: what is accepted, what each mistake is told, and what the hash depends on."""

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bench.protocol import (
    Metric,
    list_protocols,
    load_protocol,
    protocol_sha256,
    protocol_text,
    validate_file,
)
from bench.protocol.catalog import METRICS, data_dir
from bench.protocol.checks import check_num_images
from dimo.errors import DimoError

# Its own text, so that the hash below does not move when the shipped protocol does.
SMALL = """\
format = 1
name = "small"
version = 3
title = "Small"
paper = "none"

[images]
resolution = [8, 12]
channels = 3
num_images = 20
labels = "balanced"
num_classes = 10
uint8 = "round"

[seeds]
report = 1
select = 2
n_select = 10

[extractor]
name = "digits-cnn"
sha256 = "1111111111111111111111111111111111111111111111111111111111111111"

[reference]
name = "digits-all"
sha256 = "2222222222222222222222222222222222222222222222222222222222222222"
count = 30

[[metrics]]
name = "fid"
higher_is_better = false

[[metrics]]
name = "inception_score"
higher_is_better = true
splits = 10
seed = 2020

[[metrics]]
name = "precision"
higher_is_better = true
k = 3

[[metrics]]
name = "recall"
higher_is_better = true
k = 3

[uncertainty]
n_bootstrap = 20
seed = 0
level = 0.95
"""


def write(folder: Path, text: str, name: str = "small") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_value_arrives_where_it_belongs(tmp_path: Path) -> None:
    protocol = validate_file(write(tmp_path, SMALL))
    assert (protocol.name, protocol.version, protocol.title) == ("small", 3, "Small")
    assert protocol.images.resolution == (8, 12)
    assert protocol.seeds == dataclasses.replace(protocol.seeds, report=1, select=2, n_select=10)
    assert protocol.reference.count == 30
    assert protocol.uncertainty.level == 0.95
    assert [metric.name for metric in protocol.metrics] == [
        "fid",
        "inception_score",
        "precision",
        "recall",
    ]
    assert protocol.metrics[1].params == {"splits": 10, "seed": 2020}
    assert protocol.metrics[0].params == {}


def test_protocols_are_frozen(tmp_path: Path) -> None:
    protocol = validate_file(write(tmp_path, SMALL))
    with pytest.raises(dataclasses.FrozenInstanceError):
        protocol.images.num_images = 7  # type: ignore[misc]


def test_the_hash_of_known_content_is_known(tmp_path: Path) -> None:
    # Recorded results carry this hash: if it moves, every one of them loses its protocol.
    found = protocol_sha256(validate_file(write(tmp_path, SMALL)))
    content = json.dumps(tomllib.loads(SMALL), sort_keys=True, separators=(",", ":"))
    assert found == hashlib.sha256(content.encode()).hexdigest()
    assert found == "660e604678c203ce2f829c29104442cb7f0221c778cfdf635a84fa3c94f14d33"


def test_comments_layout_and_order_of_keys_do_not_change_the_hash(tmp_path: Path) -> None:
    before = protocol_sha256(validate_file(write(tmp_path, SMALL)))
    tables = re.split(r"\n(?=\[\w)", SMALL)
    moved = "# a comment\n" + "\n\n".join([tables[0], *reversed(tables[1:])])
    moved = moved.replace("report = 1\nselect = 2", "select=2\nreport = 1 # first")
    assert moved != SMALL
    assert protocol_sha256(validate_file(write(tmp_path, moved))) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("version = 3", "version = 4"),
        ("resolution = [8, 12]", "resolution = [12, 8]"),
        ("splits = 10", "splits = 5"),
        ("1111", "1112"),
        ("level = 0.95", "level = 0.9"),
    ],
)
def test_any_value_changes_the_hash(tmp_path: Path, old: str, new: str) -> None:
    before = protocol_sha256(validate_file(write(tmp_path, SMALL)))
    assert old in SMALL
    changed = SMALL.replace(old, new, 1) if old == "1111" else SMALL.replace(old, new)
    assert protocol_sha256(validate_file(write(tmp_path, changed))) != before


KID = """\
[[metrics]]
name = "kid"
higher_is_better = false
supplementary = true
subsets = 5
subset_size = 20
seed = 2020

"""


def test_a_supplementary_metric_does_not_change_the_hash(tmp_path: Path) -> None:
    before = validate_file(write(tmp_path, SMALL))
    first = SMALL.replace("[[metrics]]", KID + "[[metrics]]", 1)
    for text in (first, first.replace("subsets = 5", "subsets = 6")):
        more = validate_file(write(tmp_path, text))
        assert [(m.name, m.supplementary) for m in more.metrics[:2]] == [
            ("kid", True),
            ("fid", False),
        ]
        assert protocol_sha256(more) == protocol_sha256(before)
    required = validate_file(write(tmp_path, first.replace("supplementary = true\n", "")))
    assert protocol_sha256(required) != protocol_sha256(before)
    said_so = validate_file(write(tmp_path, SMALL.replace("k = 3", "k = 3\nsupplementary = false")))
    assert said_so == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALL[: SMALL.index("[[")] + KID + SMALL[SMALL.index("[unc") :], "is not supplementary"),
        (SMALL.replace("k = 3", "k = 3\nsupplementary = 1"), "must be true or false, not 1"),
        (SMALL.replace("[unc", KID.replace("20\n", "1\n", 1) + "[unc"), "from 2 to 20, not 1"),
        (SMALL.replace("[unc", KID.replace("kid", "fid") + "[unc"), "unknown key .*subsets"),
        (SMALL.replace("[unc", KID.replace("subsets = 5\n", "") + "[unc"), "missing key .*subsets"),
    ],
)
def test_a_supplementary_metric_is_checked_as_the_others(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(DimoError, match=message):
        validate_file(write(tmp_path, text))


@pytest.mark.parametrize("name", ["digits", "scenes-geneval"])
def test_kid_and_mind_stand_beside_fid(name: str) -> None:
    metrics = load_protocol(name).metrics
    names = [metric.name for metric in metrics]
    start = names.index("fid")
    assert names[start : start + 3] == ["fid", "kid", "mind"]
    assert [m.name for m in metrics if m.supplementary] == ["kid", "mind"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        # keys
        ("num_images = 20", "num_image = 20", "unknown key 'images.num_image'; did you mean 'num_"),
        ("splits = 10", "splits = 10\nspilt = 2", "unknown key 'metrics[1].spilt'; did you mean"),
        ("higher_is_better = false\n", "", "missing key 'metrics[0].higher_is_better'"),
        # types
        (
            "num_images = 20",
            'num_images = "20"',
            "'images.num_images' must be an integer, not '20'",
        ),
        ("level = 0.95", "level = nan", "'uncertainty.level' must be a finite number, not nan"),
        ("resolution = [8, 12]", "resolution = [8]", "must be a list of 2 values, not [8]"),
        ('"balanced"', '"random"', "must be one of 'balanced', 'prompts', not 'random'"),
        ('"balanced"', '"prompts"', "'images.labels' must be 'prompts' where there is a table"),
        ('paper = "none"', 'paper = "none"\nseeds = 3', "not valid TOML"),
        # versions
        ("format = 1", "format = 2", "'format' must be 1, the one this dimo reads, not 2"),
        # meaning
        ('name = "fid"', 'name = "fidd"', "'metrics[0].name' 'fidd'; allowed: "),
        ('name = "recall"', 'name = "precision"', "'metrics[3].name' repeats 'precision'"),
        ("higher_is_better = false", "higher_is_better = true", "must be false for 'fid'"),
        ("k = 3", "k = 20", "'metrics[2].k' must be from 1 to 19, not 20"),
        ("num_images = 20", "num_images = 25", "'images.num_images' is 25, not a multiple of"),
        ("select = 2", "select = 1", "'seeds.select' must differ from 'seeds.report' (1)"),
        ("1111", "111g", "'extractor.sha256' must be 64 lower-case hex digits"),
        ("level = 0.95", "level = 95", "'uncertainty.level' must be between 0 and 1, not 95.0"),
        ("n_bootstrap = 20", "n_bootstrap = 1", "'uncertainty.n_bootstrap' must be at least 2"),
        ('name = "small"', 'name = "other"', "'name' is 'other' but the file is named 'small'"),
    ],
)
def test_each_mistake_is_told_in_one_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in SMALL
    path = write(tmp_path, SMALL.replace(old, new, 1))
    with pytest.raises(DimoError) as caught:
        validate_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert "\n" not in message


def test_neighbour_metrics_share_one_k(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL[::-1].replace("3 = k", "4 = k", 1)[::-1])
    with pytest.raises(DimoError, match="must be the same for every metric with a 'k'"):
        validate_file(path)


def test_no_metrics(tmp_path: Path) -> None:
    head, _, rest = SMALL.partition("[[metrics]]")
    uncertainty = rest[rest.index("[uncertainty]") :]
    path = write(tmp_path, head.replace('paper = "none"', 'paper = ""\nmetrics = []') + uncertainty)
    with pytest.raises(DimoError, match="must name at least one metric"):
        validate_file(path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DimoError, match="not valid TOML"):
        validate_file(path)


def test_load_by_name_and_by_path(tmp_path: Path) -> None:
    assert load_protocol("digits").name == "digits"
    assert load_protocol(str(write(tmp_path, SMALL))).name == "small"
    assert load_protocol(tmp_path / "small.toml").name == "small"


def test_unknown_name_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DimoError, match=r"unknown protocol 'digit'; .*did you mean 'digits'"):
        load_protocol("digit")
    with pytest.raises(DimoError, match=r"cannot read .*nowhere\.toml: No such file"):
        load_protocol(tmp_path / "nowhere.toml")
    with pytest.raises(DimoError, match="cannot read"):
        load_protocol(tmp_path)


def test_every_shipped_protocol_is_valid_listed_and_explained() -> None:
    protocols = list_protocols()
    names = [protocol.name for protocol in protocols]
    assert names == sorted(path.stem for path in data_dir("protocols").glob("*.toml"))
    assert "digits" in names
    explained = (data_dir("protocols") / "README.md").read_text(encoding="utf-8")
    for name in [*names, *METRICS]:
        assert f"`{name}`" in explained


def test_digits_fixes_what_it_should() -> None:
    protocol = load_protocol("digits")
    assert (protocol.images.num_images, protocol.images.num_classes) == (5000, 10)
    assert (protocol.seeds.report, protocol.seeds.select) == (1000, 2000)
    assert protocol.reference.count == 1797
    # what their results are known by
    assert protocol_sha256(protocol).startswith("95932125e4f0")
    assert protocol_sha256(load_protocol("scenes-geneval")).startswith("90803fb9d152")


def test_the_papers_protocol_fixes_what_it_should() -> None:
    protocol = load_protocol("imagenet256-adm")
    assert (protocol.images.num_images, protocol.images.num_classes) == (50_000, 1000)
    assert (protocol.extractor.name, protocol.extractor.resize) == ("inception", "tf1-bilinear")
    assert (protocol.reference.count, protocol.reference.statistics_count) == (10_000, 1_281_167)
    assert [metric.name for metric in protocol.metrics][:3] == ["fid", "sfid", "inception_score"]
    assert {m.params["k"] for m in protocol.metrics if "k" in m.params} == {3}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"digits-cnn"', '"digits-cn"', "'extractor.name' 'digits-cn'; allowed: .*package.module"),
        ('"digits-cnn"', '"digits-cnn"\nresize = "x"', "has no choice"),
        ('"digits-cnn"', '"inception"', "unknown 'extractor.resize' ''; allowed: pil-bicubic"),
        ('"digits-cnn"', '"a.b:C"\nresize = "x"', "resizes by itself"),
        ('"fid"', '"sfid"', "'sfid', which needs spatial; the extractor 'digits-cnn' gives"),
        ('"fid"', '"kid"', r"missing key 'metrics\[0\].subsets'"),
        ("k = 3", "k = 3\nblocks = 2", r"missing key 'metrics\[2\].block_size'"),
        ("k = 3", "k = 3\nblocks = 3\nblock_size = 7\nseed = 0", "uses 21 images of each side"),
        ("count = 30", "count = 30\nstatistics_count = 1", "'reference.statistics_count' must be"),
    ],
)
def test_extractors_and_metrics_must_fit(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(DimoError, match=message):
        validate_file(write(tmp_path, SMALL.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('[extractor]\nname = "scenes-clip"',
         '[extractor]\nname = "inception"\nresize = "tf1-bilinear"',
         "'extractor.name' is 'inception'; allowed beside a detector: digits-cnn, scenes-clip"),
        ('"scenes-held-out"\nsha256 = "685f', '"mine"\nsha256 = "685f',
         "'reference.name' is 'mine'; allowed beside a detector: digits-all, scenes-held-out"),
        ('[scorer]\nname = "scenes-clip"',
         '[scorer]\nname = "clip-score"\nmodel = "ViT-B-32"\npreprocessing = "pil"',
         "'scorer.name' is 'clip-score'; allowed beside a detector: scenes-clip"),
        ('[scorer]\nname = "scenes-clip"', '[scorer]\nname = "clip-score"\npreprocessing = "pil"',
         "missing key 'scorer.model'"),
        ('scale = "cosine"', 'scale = "cosine"\nmodel = "x"', "'scorer.model' must be left out"),
        ('scale = "cosine"', 'scale = "cosine"\nprefix = "x"', "'scorer.prefix' must be left out"),
        ('scale = "cosine"', 'scale = "cosine"\npreprocessing = "pil"', "must be left out"),
        ('scale = "cosine"', 'scale = "scaled"', "unknown 'scorer.scale' 'scaled'"),
        ('name = "scenes-detector"', 'name = "mmdet-mask2former-swin-s"',
         "'extractor' must be left out: dimo sees no images with 'mmdet-mask2former-swin-s'"),
        ('name = "scenes-detector"', 'name = "scenes"', "unknown 'detector.name' 'scenes'"),
    ],
)  # fmt: skip
def test_what_may_stand_beside_a_detector(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = protocol_text("scenes-geneval")
    assert text.count(old) == 1
    with pytest.raises(DimoError) as caught:
        validate_file(write(tmp_path, text.replace(old, new), "scenes-geneval"))
    assert message in str(caught.value)


def test_extractor_and_reference_come_together_beside_a_detector(tmp_path: Path) -> None:
    head, _, rest = protocol_text("scenes-geneval").partition("[reference]")
    text = head + rest[rest.index("[scorer]") :]
    first, last = (text.index(f'[[metrics]]\nname = "{name}"') for name in ("fid", "clip_score"))
    text = text[:first] + text[last:]  # without the metrics of features
    with pytest.raises(DimoError, match="must come together beside a detector"):
        validate_file(write(tmp_path, text, "scenes-geneval"))


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("geneval", "9787187926ef"),
        ("geneval-hf", "b6438b2bb84d"),
        ("coco30k", "25ba9a7482ea"),
        ("hpsv2-v2.1", "7b0467dffb16"),
    ],
)
def test_official_protocols_keep_their_hashes(name: str, start: str) -> None:
    assert protocol_sha256(load_protocol(name)).startswith(start)


def test_new_keys_change_no_old_hash(tmp_path: Path) -> None:
    """A key at its default is not part of the hashed text; any other value is."""
    plain = validate_file(write(tmp_path, SMALL))
    open_ended = SMALL.replace("count = 30", "count = 30\nstatistics_count = 40")
    other = validate_file(write(tmp_path, open_ended))
    assert protocol_sha256(plain) != protocol_sha256(other)
    same = dataclasses.replace(
        other, reference=dataclasses.replace(other.reference, statistics_count=None)
    )
    assert protocol_sha256(same) == protocol_sha256(plain)


def test_text_is_the_file_itself() -> None:
    text = protocol_text("digits")
    assert text == (data_dir("protocols") / "digits.toml").read_text(encoding="utf-8")


def test_data_dirs_hold_what_they_should() -> None:
    assert (data_dir("published") / "published.csv").is_file()


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            "bench.protocol.catalog, dimo.util.schema, bench.protocol, bench.records.store",
            "pandas",
        ),
        ("bench.report", "torch"),
    ],
)
def test_reading_results_needs_no_heavy_package(modules: str, absent: str) -> None:
    heavy = {"torch", "numpy", "scipy", "sklearn"} if absent == "pandas" else {"torch", "scipy"}
    program = f"import sys, {modules}; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert not (heavy | {absent}) & set(done.stdout.split())


def test_a_quick_look_has_enough_images_for_every_metric():
    digits = load_protocol("digits")
    for count in (10, 4990, 5010):
        check_num_images(digits, count)
    kid = Metric("kid", False, {"subsets": 3, "subset_size": 35, "seed": 0})
    with pytest.raises(DimoError, match=r"must be from 2 to 20, not 35; give --num-images 40 or"):
        check_num_images(dataclasses.replace(digits, metrics=(kid,)), 20)
    supplementary = dataclasses.replace(kid, supplementary=True)
    check_num_images(dataclasses.replace(digits, metrics=(*digits.metrics[:1], supplementary)), 20)


def test_a_protocol_for_statistics_alone():
    """ADM's and others' files of mu and sigma, which hold no images."""
    alone, adm = load_protocol("imagenet256-fid"), load_protocol("imagenet256-adm")
    assert [metric.name for metric in alone.metrics] == ["fid", "inception_score"]
    assert (alone.extractor, alone.images) == (adm.extractor, adm.images)
