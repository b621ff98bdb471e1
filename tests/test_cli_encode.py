"""`dimo encode` and the caches it makes: resumed, refused, equal at any batch size."""

import fcntl
import io
import json
import resource
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.images import class_folders, open_images
from bench.images.codec import centre_crop, encode_png
from dimo.data.encode import encode_images
from dimo.data.tokens import read_cache_info
from dimo.errors import DimoError
from dimo.models import digits
from dimo.weights.catalog import ASSETS
from dimo.weights.files import load_metadata, read_state_dict, save_tensors
from dimo.zoo.loading import load_teacher, load_tokens, weights_file
from dimo.zoo.teachers import get_teacher

CPU = torch.device("cpu")
COUNT = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The first digits, one folder a class."""
    images, labels = digits.load()
    root = tmp_path_factory.mktemp("data") / "set"
    for i in range(COUNT):
        path = root / str(int(labels[i])) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(images[i].permute(1, 2, 0).numpy()))
    return root


@pytest.fixture(scope="module")
def cache(folder, tmp_path_factory):
    """A whole cache, made in this process."""
    path = tmp_path_factory.mktemp("cache") / "whole.safetensors"
    encode(folder, path)
    return path


def encode(folder, out, *, batch=64, progress=lambda done: None, **options):
    """As the command does, without the command."""
    images, row = open_images([folder], recursive=True), get_teacher("digits")
    return encode_images(
        lambda first: images.batches(range(first, len(images)), batch),
        torch.from_numpy(class_folders(images.names)),
        out,
        names=images.names,
        target=row,
        tokenizer=row.tokenizer(weights_file(row, "tokenizer")),
        progress=progress,
        **options,
    )


def of_bundled(labels):
    """Tokens of the first digits in order of class, as a set with folders has them."""
    whole = load_tokens(None, teacher="digits")
    order = torch.argsort(whole.labels[:COUNT], stable=True)
    assert torch.equal(whole.labels[:COUNT][order], labels)
    return whole.tokens[:COUNT][order]


def test_a_folder_for_each_class(dimo, folder, cache):
    out, err = dimo("encode", folder, "-o", "t.safetensors", "--json")
    told = json.loads(out)
    assert (told["made"], told["images"], told["crop"], told["mirrored"]) == (200, 200, "none", 0)
    assert "t.safetensors: 200 images," in err
    data = load_tokens(Path("t.safetensors"), teacher="digits")
    assert (data.tokens.dtype, data.labels.dtype) == (torch.int64, torch.int64)
    assert torch.equal(data.tokens, of_bundled(data.labels))
    assert len(told["tokenizer_sha256"]) == len(told["source_sha256"]) == len(data.sha256) == 64
    assert Path("t.safetensors").read_bytes() == cache.read_bytes()
    assert [path.name for path in Path().iterdir()] == ["t.safetensors"]
    _, err = dimo("encode", folder, "-o", "t.safetensors")
    assert "already encoded" in err


def test_embedded_data_has_the_hash_of_its_content():
    first, again = (load_tokens(None, teacher="digits") for _ in range(2))
    assert first.tokens.shape == (1797, 16)
    assert first.sha256 == again.sha256


@pytest.mark.parametrize("batch", [1, 7, 200, 1000])
def test_the_batch_size_changes_nothing(folder, cache, tmp_path, batch):
    assert encode(folder, tmp_path / "x.safetensors", batch=batch).made == COUNT
    assert (tmp_path / "x.safetensors").read_bytes() == cache.read_bytes()


@pytest.mark.parametrize("stop_at", [1, 2, 9])
def test_an_interrupted_encoding_goes_on(folder, cache, tmp_path, stop_at):
    out, told = tmp_path / "x.safetensors", []

    def interrupt(done):
        told.append(done)
        if len(told) == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(folder, out, batch=20, progress=interrupt)
    assert not out.exists()
    with (tmp_path / "x.safetensors.part").open("ab") as file:
        file.write(b"a batch that was killed before it was counted")
    assert encode(folder, out, batch=33).made == COUNT - 20 * stop_at
    assert out.read_bytes() == cache.read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_lost_data_is_encoded_again(folder, cache, tmp_path):
    out = tmp_path / "x.safetensors"

    def interrupt(done):
        if done == 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(folder, out, batch=50, progress=interrupt)
    (tmp_path / "x.safetensors.part").write_bytes(b"")
    assert encode(folder, out).made == COUNT
    assert out.read_bytes() == cache.read_bytes()


@pytest.mark.parametrize(
    "how",
    [
        *(pytest.param(how, marks=pytest.mark.slow) for how in (signal.SIGINT, signal.SIGKILL)),
        signal.SIGTERM,
    ],
)
def test_a_stopped_process_goes_on(dimo, folder, cache, run_stopped, tmp_path, how):
    arguments = ["encode", str(folder), "-o", "x.safetensors"]
    slowly = ("--batch-size", "1")
    code, told = run_stopped(
        *arguments, *slowly, cwd=tmp_path, file="x.safetensors.part.json", how=how
    )
    assert code == (-how if how == signal.SIGKILL else 128 + how), told
    assert ("rerun the same command to continue" in told) == (how != signal.SIGKILL)
    assert not (tmp_path / "x.safetensors").exists()
    (tmp_path / ".x.safetensors.part.json.abc.tmp").write_bytes(b"left")
    out, _ = dimo(*arguments, "--json")
    assert 0 < json.loads(out)["made"] < COUNT
    assert (tmp_path / "x.safetensors").read_bytes() == cache.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_other_images_do_not_go_on_where_these_stopped(dimo, folder, tmp_path):
    encode(folder, tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    _, err = dimo("encode", folder, "-o", "x.safetensors", "--mirror", code=2)
    assert "was made with mirrored False, not True; choose another --out, or start" in err
    assert (tmp_path / "x.safetensors").read_bytes() == before
    dimo("encode", folder, "-o", "x.safetensors", "--mirror", "--force")
    both, one = (
        load_tokens(path, teacher="digits")
        for path in (tmp_path / "x.safetensors", write(tmp_path / "one.safetensors", before))
    )
    assert torch.equal(both.tokens[::2], one.tokens)
    assert torch.equal(both.labels, one.labels.repeat_interleave(2))
    tokenizer = load_teacher("digits", device=CPU).tokenizer
    pixels = tokenizer.decode(one.tokens).mul(127.5).add(127.5).round().to(torch.uint8)
    again = tokenizer.encode(pixels.flip(-1))
    assert (both.tokens[1::2] == again).float().mean() > 0.6  # the codebook is coarse


def write(path, data):
    path.write_bytes(data)
    return path


def test_webdataset_labels_and_other_sizes(dimo, tmp_path):
    rng = np.random.default_rng(0)
    files = {}
    for i, mode in enumerate(("RGB", "L", "CMYK", "RGBA")):
        pixels = rng.integers(0, 255, (19 + i, 30, 3), dtype=np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(data, "TIFF")
        files |= {f"{i}.tiff": data.getvalue(), f"{i}.cls": str(9 - i).encode()}
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    _, err = dimo("encode", "shard.tar", "-o", "x.safetensors", code=2)
    assert "'2.tiff' in shard.tar: mode CMYK" in err
    dimo("encode", "shard.tar", "-o", "y.safetensors", "--centre-crop")
    data = load_tokens(Path("y.safetensors"), teacher="digits")
    assert data.labels.tolist() == [9, 8, 7, 6]
    assert read_cache_info(Path("y.safetensors")).crop == "adm"


def test_the_crop_is_that_of_adm():
    pixels = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    assert (centre_crop(pixels, 16) == pixels[:, 4:20]).all()  # nothing to resize
    means = pixels.reshape(8, 2, 12, 2, 3).mean((1, 3))  # halved once, by boxes
    assert np.abs(centre_crop(pixels, 8) - means[:, 2:10]).max() <= 1  # rounded twice
    for height, width in ((17, 40), (9, 8), (5, 6), (100, 31)):
        wide = np.full((height, width, 3), 77, np.uint8)
        assert (centre_crop(wide, 8) == np.full((8, 8, 3), 77)).all()


def test_a_cache_of_the_vqgan(dimo, small_maskgit, make_images, tmp_path):
    """A small VQGAN in the official layout; the cache is refused once its weights are others."""
    folder = tmp_path / "images"
    for i, image in enumerate(make_images(5, 80, 64)):
        path = folder / "abcde"[i] / "x.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(encode_png(image.permute(1, 2, 0).numpy()))
    arguments = ("encode", folder, "--teacher", "maskgit", "--weights", small_maskgit)
    _, err = dimo(*arguments, "-o", "x.safetensors", code=2)
    assert "'a/x.png' is 80 x 64; allowed for teacher 'maskgit': 64 x 64; crop" in err
    for size in (1, 5):
        dimo(*arguments, "-o", f"{size}.safetensors", "--centre-crop", "--batch-size", size)
    assert Path("1.safetensors").read_bytes() == Path("5.safetensors").read_bytes()
    data = load_tokens(Path("5.safetensors"), teacher="maskgit", weights=small_maskgit)
    assert (data.tokens.shape, data.labels.tolist()) == ((5, 16), [0, 1, 2, 3, 4])
    with pytest.raises(DimoError, match=r"teacher 'maskgit' with sha256 .*, and that of 'digits'"):
        load_tokens(Path("5.safetensors"), teacher="digits")
    with pytest.raises(DimoError, match="'maskgit' comes without data; encode a folder"):
        load_tokens(None, teacher="maskgit", weights=small_maskgit)


def changed(cache, path, info=None, **tensors):
    """A cache with other tensors or metadata."""
    found = read_state_dict(cache) | tensors
    save_tensors(path, found, load_metadata(cache) | (info or {}))
    return path


BAD_CACHES = {
    "other tokenizer": (
        lambda cache, path: changed(cache, path, {"tokenizer_sha256": "0" * 64}),
        "sha256 000000000000, and that of 'digits' has",
    ),
    "other version": (lambda cache, path: changed(cache, path, {"format": 2}), "format 2"),
    "foreign metadata": (lambda cache, path: changed(cache, path, {"kind": "x"}), "unknown key"),
    "truncated": (
        lambda cache, path: write(path, cache.read_bytes()[:-100]),
        r"cannot read .*x\.safetensors: .*make it again with: dimo encode",
    ),
    "no cache": (
        lambda cache, path: write(path, (ASSETS / "digits-teacher.safetensors").read_bytes()),
        "is no token cache, it holds",
    ),
    "missing": (lambda cache, path: path, r"cannot read .*x\.safetensors"),
    "tokens of another length": (
        lambda cache, path: changed(cache, path, tokens=torch.zeros(COUNT, 15, dtype=torch.uint16)),
        r"tokens of .* are uint16 \[200, 15\]; allowed .* uint16 \[200, 16\]",
    ),
    "fewer labels": (
        lambda cache, path: changed(cache, path, labels=torch.zeros(3, dtype=torch.int64)),
        r"labels of .* are int64 \[3\]",
    ),
    "real labels": (
        lambda cache, path: changed(cache, path, labels=torch.zeros(COUNT)),
        "labels of .* are float32",
    ),
    "token out of range": (
        lambda cache, path: changed(
            cache, path, tokens=torch.full((COUNT, 16), 256, dtype=torch.uint16)
        ),
        "tokens of .* are from 256 to 256; allowed for teacher 'digits': 0 to 255",
    ),
    "label out of range": (
        lambda cache, path: changed(cache, path, labels=torch.arange(COUNT) - 1),
        "labels of .* are from -1 to 198; allowed for teacher 'digits': 0 to 9",
    ),
}


@pytest.mark.parametrize("case", BAD_CACHES)
def test_bad_caches_are_refused(cache, tmp_path, case):
    make, words = BAD_CACHES[case]
    with pytest.raises(DimoError, match=words) as error:
        load_tokens(make(cache, tmp_path / "x.safetensors"), teacher="digits")
    assert "\n" not in str(error.value)


MISTAKES = {
    "no folder": (["nowhere", "-o", "x.safetensors"], "no images at nowhere"),
    "two classes": (["two", "-o", "x.safetensors"], "two has 2 folders; allowed as classes"),
    "no classes": (["two/0", "-o", "x.safetensors"], "not in a folder of their class"),
    "labels out of range": (
        ["two", "--labels", "cyclic:12", "-o", "x.safetensors"],
        "2 of 12 labels are out of range, e.g. 10 of '1/4.png'; allowed for teacher 'digits': 0 to",
    ),
    "unknown labels": (["two", "--labels", "floder", "-o", "x.safetensors"], "unknown labels"),
    "other suffix": (["two", "-o", "x.npz"], "--out x.npz is not a .safetensors"),
    "unknown teacher": (["two", "--teacher", "digts", "-o", "x.safetensors"], "did you mean"),
    "no cache there": (["two", "--labels", "cyclic:10", "-o", "t.safetensors"], "cannot read t."),
    "damaged image": (["torn", "--labels", "cyclic:10", "-o", "x.safetensors"], "'0.png' in torn"),
    "file as folder": (
        ["two", "--labels", "cyclic:10", "-o", "t.safetensors/x.safetensors"],
        "cannot write t.safetensors/x.safetensors.part",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(dimo, folder, tmp_path, mistake):
    source = sorted(folder.rglob("*.png"))[0].read_bytes()
    for name in ["0", "1"]:
        (tmp_path / "two" / name).mkdir(parents=True)
        for i in range(6):
            (tmp_path / "two" / name / f"{i}.png").write_bytes(source)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "0.png").write_bytes(source[:60])
    (tmp_path / "t.safetensors").write_bytes(b"x")
    arguments, words = MISTAKES[mistake]
    out, err = dimo("encode", *arguments, code=2)
    assert out == ""
    assert err.startswith("error: ")
    assert words in err
    assert (tmp_path / "t.safetensors").read_bytes() == b"x"
    assert not (tmp_path / "x.safetensors").exists()


def test_a_second_process_waits(folder, tmp_path):
    part = (tmp_path / "x.safetensors.part").open("wb")
    fcntl.flock(part, fcntl.LOCK_EX)
    with pytest.raises(DimoError, match="being written by another process"):
        encode(folder, tmp_path / "x.safetensors")
    part.close()


def test_a_full_disk_is_one_error_and_the_work_is_kept(folder, cache, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(DimoError, match=r"cannot write .*File too large; free space"):
            encode(folder, tmp_path / "x.safetensors", batch=20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert encode(folder, tmp_path / "x.safetensors").made == COUNT - 80
    assert (tmp_path / "x.safetensors").read_bytes() == cache.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
