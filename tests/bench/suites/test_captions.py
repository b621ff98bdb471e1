"""CLIP score beside FID: digits as the set, a tiny CLIP, captions in a file."""

import json

import numpy as np
import pytest

from bench.features.clip import load_pairs
from bench.images.codec import encode_png
from bench.protocol import load_protocol, validate_file
from bench.protocol.catalog import data_dir
from bench.records.store import load_all
from bench.report import collect_report, report_markdown
from bench.suites.captions import Captions, CLIPScorer, paired, read_captions
from dimo.errors import DimoError
from dimo.models import digits

COUNT = 40
PROTOCOL = """
format = 1
name = "captions"
version = 1
title = "Captions"
paper = "none"
[images]
resolution = [8, 8]
channels = 1
num_images = 40
labels = "prompts"
num_classes = 40
uint8 = "round"
[seeds]
report = 1
select = 2
n_select = 40
[prompts]
name = "captions.json"
sha256 = "any"
images_per_prompt = 1
[prompts.tags]
caption = 40
[extractor]
name = "digits-cnn"
sha256 = "any"
[reference]
name = "digits-all"
sha256 = "REFERENCE"
count = 1797
[scorer]
name = "clip-score"
model = "ViT-B-32"
sha256 = "any"
preprocessing = "pil"
prefix = "A photo depicts "
scale = "cosine"
[[metrics]]
name = "fid"
higher_is_better = false
[[metrics]]
name = "clip_score"
higher_is_better = true
[uncertainty]
n_bootstrap = 200
seed = 0
level = 0.95
"""


@pytest.fixture
def made(tmp_path, tiny_clip):
    """Options of `dimo eval` for forty digits and their captions."""
    images, labels = digits.load()
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(COUNT):
        pixels = images[number].expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
        (folder / f"{number:05d}.png").write_bytes(encode_png(pixels))
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps([f"the digit {label}" for label in labels[:COUNT].tolist()]))
    protocol = _protocol(tmp_path)
    weights = tiny_clip(tmp_path / "clip.pt")
    options = {
        "--protocol": protocol, "--prompts": captions, "--clip-weights": weights,
        "--results": tmp_path / "results", "--cache": "none", "--device": "cpu",
    }  # fmt: skip
    return folder, options


def _protocol(folder):
    path, reference = folder / "captions.toml", load_protocol("digits").reference.sha256
    path.write_text(PROTOCOL.replace("REFERENCE", reference))
    return path


def run(dimo, made, **changes):
    folder, options = made
    given = {**options, **changes}
    return dimo("eval", folder, *[part for item in given.items() if item[1] for part in item])


def test_both_metrics_of_one_record(dimo, made, tmp_path):
    code, out, said = run(dimo, made)
    assert code == 0, said
    assert "CLIP score" in out
    ((record,), _) = load_all(tmp_path / "results")
    assert list(record.metrics) == ["fid", "clip_score"]
    pairs = load_pairs(made[1]["--clip-weights"], "ViT-B-32", "pil")
    scorer = CLIPScorer(pairs, "A photo depicts ", "cosine")
    images, labels = digits.load()
    pixels = [i.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy() for i in images[:COUNT]]
    values = scorer.score(pixels, [f"the digit {label}" for label in labels[:COUNT].tolist()])
    assert record.metrics["clip_score"].value == pytest.approx(values.mean(), abs=1e-6)
    with np.load(tmp_path / "results" / "contributions" / f"{record.run_id}.npz") as file:
        assert set(file.files) >= {"fid", "clip_score"}
        np.testing.assert_allclose(file["clip_score"], values, atol=1e-6)
    protocols = [validate_file(made[1]["--protocol"])]
    report = collect_report([record], [], [], protocols=protocols, folder=tmp_path)
    text = report_markdown(report)
    assert "features of `digits-cnn`" in text
    assert "scores of `clip-score`, ViT-B-32" in text
    assert "prefix `A photo depicts`" in text


def test_two_ranks_give_what_one_gives(dimo, made, eval_on_two_ranks, tmp_path):
    assert run(dimo, made)[0] == 0
    ((one,), _) = load_all(tmp_path / "results")
    folder, options = made
    options |= {"--results": tmp_path / "two"}
    two = eval_on_two_ranks(folder, *[part for item in options.items() for part in item])
    for name, metric in one.metrics.items():
        assert two["metrics"][name]["value"] == pytest.approx(metric.value, rel=1e-9)
    assert two["evidence"]["images_sha256"] == one.evidence.images_sha256
    assert len(list((tmp_path / "two").glob("*.json"))) == 1


TEXTS = tuple(f"A photo, no. {n}: {w}!" for n, w in enumerate(["cat", "dog", "fox"] * 5))
ORDER = list(range(15))
KEYS = {  # names of the images of the captions in order, as samplers write them
    "unpadded": [f"{i}.png" for i in ORDER],
    "from one, with a word": [f"run2_{i + 1}_step_1.png" for i in ORDER],
    "number and caption": [f"{i}_{text[9:]}.jpg" for i, text in enumerate(TEXTS)],
    "captions": [f"{text.replace(' ', '_').strip('!')}.png" for text in TEXTS],
    "captions, numbered": [f"{text}_0.png" for text in TEXTS],
}


@pytest.mark.parametrize("key", KEYS)
def test_images_find_their_captions_by_name(key):
    names = sorted(KEYS[key])
    assert [KEYS[key][n] for n in paired(names, Captions(TEXTS), 1)] == names
    assert names != KEYS[key]


def test_several_images_of_a_caption_and_arrays():
    names = [f"{prompt}_{sample}.png" for prompt in range(3) for sample in range(2)]
    assert paired(names, Captions(TEXTS[:3]), 2) == [0, 0, 1, 1, 2, 2]
    cut = [text[:30] + ".png" for text in ("a very long text that was cut, one", "another such")]
    assert paired(cut, Captions(("a very long text that was cut, one", "another such")), 1) == [
        0,
        1,
    ]
    assert paired([f"a.npz[{i}]" for i in range(12)], Captions(TEXTS[:12]), 1) == ORDER[:12]


@pytest.mark.parametrize(
    "names",
    [
        [f"{chr(97 + i)}.png" for i in ORDER],  # no number, no caption
        [f"rank{i % 3}_{i // 3}.png" for i in ORDER],  # by rank, or in turns?
        [f"COCO_{i * i:012d}.png" for i in ORDER],  # a number of something else
        [*(f"{i}.png" for i in ORDER[:14]), "15.png"],  # one is missing, one too much
    ],
)
def test_an_order_that_could_be_two_is_refused(names):
    with pytest.raises(DimoError, match="which image shows which caption cannot be told"):
        paired(sorted(names), Captions(TEXTS), 1)


def test_captions_may_name_their_images(tmp_path):
    named = validate_file(_protocol(tmp_path)).prompts
    texts = [f"caption {i}" for i in range(COUNT)]
    names = [f"{i * i}.png" for i in range(COUNT)]
    table = dict(zip(names, texts, strict=True))
    rows = "".join(f"{name},{text}\r\n" for name, text in table.items())
    files = {
        "a.json": "\ufeff" + json.dumps(table),
        "b.json": json.dumps({name[:-4]: text for name, text in table.items()}),
        "c.csv": "\ufefffile,caption\r\n" + rows,
        "d.csv": "caption\n" + "\n".join(texts),
        "e.txt": "\n".join(texts) + "\n\n",
        "f.json": json.dumps(texts) + "\n\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        found = read_captions(tmp_path / name, named)
        assert list(found.texts) == texts, name
        assert (found.images is not None) == (name < "d")
        if name < "d":
            assert [names[n] for n in paired(sorted(names), found, 1)] == sorted(names)
    with pytest.raises(DimoError, match=r"has none for 1 of 40 images \('x\.png'\)"):
        paired([*names[1:], "x.png"], read_captions(tmp_path / "a.json", named), 1)


def test_the_order_of_names_changes_no_score(dimo, made, tmp_path):
    """Sorted as text, 10.png comes before 2.png."""
    assert run(dimo, made)[0] == 0
    for number in range(COUNT):
        (made[0] / f"{number:05d}.png").rename(made[0] / f"{number}.png")
    assert run(dimo, made)[0] == 0
    records, _ = load_all(tmp_path / "results")
    first, second = (record.metrics["clip_score"] for record in records)
    wanted = [first.value, first.low, first.high]  # the last bits depend on an image's batch
    assert [second.value, second.low, second.high] == pytest.approx(wanted, rel=1e-6)


def test_other_captions_stand_in_another_table(dimo, made, tmp_path):
    assert run(dimo, made)[0] == 0
    captions = made[1]["--prompts"]
    captions.write_text(json.dumps(["a cat"] * COUNT))
    assert run(dimo, made)[0] == 0
    records, _ = load_all(tmp_path / "results")
    protocols = [validate_file(made[1]["--protocol"])]
    report = collect_report(records, [], [], protocols=protocols, folder=tmp_path)
    assert [len(part.records) for part in report.protocols] == [1, 1]
    code, _, error = dimo("compare", *(record.run_id for record in records),
        "--protocol", made[1]["--protocol"], "--results", tmp_path / "results")  # fmt: skip
    assert code == 2
    assert "measured with different prompts" in error


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "0 prompts instead of 40"),
        ('["a", 1]', "not a list of texts"),
        (None, "cannot read prompts"),
    ],
)
def test_captions_that_do_not_fit(dimo, made, tmp_path, content, said):
    captions = made[1]["--prompts"]
    captions.unlink() if content is None else captions.write_text(content)
    code, _, error = run(dimo, made)
    assert code == 2
    assert said in error
    assert not (tmp_path / "results").exists()


def test_what_is_missing_is_named(dimo, made, tmp_path):
    for option, value, said in (
        ("--prompts", None, "needs the prompts of the images (captions.json)"),
        ("--clip-weights", None, "needs the weights of CLIP ViT-B-32"),
        ("--clip-weights", tmp_path / "no.pt", "no weights of CLIP at"),
    ):
        code, _, error = run(dimo, made, **{option: value})
        assert code == 2
        assert said in error


def test_the_shipped_protocol_names_model_and_prefix():
    protocol = load_protocol("coco30k")
    assert [metric.name for metric in protocol.metrics] == ["fid", "clip_score"]
    assert (protocol.scorer.model, protocol.scorer.prefix) == ("ViT-g-14", "A photo depicts ")
    clean = load_protocol("imagenet256-clean")
    assert protocol.extractor == clean.extractor
    assert (data_dir("protocols") / "coco30k.toml").is_file()
