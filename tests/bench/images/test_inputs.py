"""Sets of images: every container gives the same images, every bad input one clear error."""

import io
import itertools
import json
import os
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from bench.features.pipeline import read_features
from bench.images import content_sha256, open_images
from bench.images.codec import decode_image, inspect_image
from bench.images.dataset import _ordered_map
from dimo.errors import DimoError

NAMES = [f"{i:03d}.png" for i in range(7)]


def _noise(count=7, height=16, width=20, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def _encode(image, codec="PNG", **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, codec, **options)
    return buffer.getvalue()


PIXELS = _noise()
RGB = Image.fromarray(PIXELS[0])
PNG = _encode(RGB)


def _write_folder(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def _write_zip(path, files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def _write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            data = data if isinstance(data, bytes) else data.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def _pngs(pixels=PIXELS, names=NAMES):
    return dict(zip(names, map(_encode, pixels), strict=True))


def _scan(images):
    return images.scan(range(len(images)), lambda done: None)


def _npz(path, compressed=False, **arrays):
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


CONTAINERS = {
    "folder": lambda tmp: _write_folder(tmp / "set", _pngs()),
    "zip": lambda tmp: _write_zip(tmp / "set.zip", _pngs()),
    "zip deflated": lambda tmp: _write_zip(tmp / "set.zip", _pngs(), zipfile.ZIP_DEFLATED),
    "zip of a folder": lambda tmp: _write_zip(
        tmp / "set.zip", {f"run/out/{k}": v for k, v in _pngs().items()}
    ),
    "tar": lambda tmp: _write_tar(tmp / "set.tar", dict(reversed(_pngs().items()))),
    "tar of .": lambda tmp: _write_tar(tmp / "set.tar", {f"./{k}": v for k, v in _pngs().items()}),
    "npz": lambda tmp: _npz(tmp / "set.npz", arr_0=PIXELS),
    "npz in Fortran order": lambda tmp: _npz(tmp / "set.npz", arr_0=np.asfortranarray(PIXELS)),
    "npz deflated": lambda tmp: _npz(tmp / "set.npz", compressed=True, images=PIXELS),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_same_images_in_the_same_order(container, tmp_path):
    images = open_images([CONTAINERS[container](tmp_path)])
    assert (len(images), images.ignored, images.labels) == (7, [], None)
    if "npz" not in container:
        assert list(images.names) == NAMES
    done = []
    infos = images.scan(range(2, 7), done.append)
    assert [(i.height, i.width, i.mode, i.problem) for i in infos] == [(16, 20, "RGB", None)] * 5
    assert {i.codec for i in infos} == {"array" if "npz" in container else "png"}
    assert len({i.sha256 for i in infos}) == 5
    assert done[-1] == 5
    expected = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    # ascending, a step back, a stride as one of several ranks takes it, one image
    for rows in (range(0, 4), range(4, 7), range(1, 3), range(0, 7, 3), range(6, 7)):
        loaded = images.load(rows)
        assert loaded.dtype == torch.uint8
        assert loaded.is_contiguous()
        assert torch.equal(loaded, expected[rows.start : rows.stop : rows.step])


def test_shards_are_joined_in_the_given_order(tmp_path):
    shards = [
        _npz(tmp_path / "a.npz", arr_0=PIXELS[:3], arr_1=np.array([5, 6, 7])),
        _write_folder(tmp_path / "b", _pngs(PIXELS[3:5], ["x_1.png", "x_2.png"])),
        _write_tar(tmp_path / "c.tar", _pngs(PIXELS[5:], ["y_3.png", "y_4.png"])),
    ]
    (tmp_path / "b" / "labels.csv").write_text("file,label\nx_1.png,1\nx_2.png,2\n")
    (tmp_path / "labels.json").write_text('{"y_3.png": 3, "y_4.png": 4}')
    images = open_images(shards)
    assert torch.equal(images.load(range(1, 7)), torch.from_numpy(PIXELS[1:]).permute(0, 3, 1, 2))
    assert torch.equal(
        images.load(range(1, 7, 2)), torch.from_numpy(PIXELS[1::2]).permute(0, 3, 1, 2)
    )
    assert images.labels.tolist() == [5, 6, 7, 1, 2, 3, 4]
    assert images.labels.dtype == np.int64
    assert [i.codec for i in _scan(images)] == ["array"] * 3 + ["png"] * 4
    turned = open_images([shards[1], shards[0], shards[2]])
    infos = _scan(images), _scan(turned)
    assert content_sha256(infos[0], None) != content_sha256(infos[1], None)


def test_folders_are_read_flat_unless_asked(tmp_path):
    files = _pngs() | {"notes.txt": "hello", ".hidden.png": PNG, "sub/008.PNG": PNG}
    folder = _write_folder(tmp_path / "set", files)
    flat = open_images([folder])
    assert list(flat.names) == NAMES
    assert flat.ignored == [".hidden.png", "notes.txt", "sub/"]
    deep = open_images([folder], recursive=True)
    assert list(deep.names) == [*NAMES, "sub/008.PNG"]
    assert deep.ignored == [".hidden.png", "notes.txt"]


def test_archives_leave_out_what_macos_adds(tmp_path):
    files = {f"set/{k}": v for k, v in _pngs().items()} | {"__MACOSX/set/._000.png": b"junk"}
    images = open_images([_write_zip(tmp_path / "set.zip", files)])
    assert list(images.names) == NAMES
    assert images.ignored == ["__MACOSX/set/._000.png"]


def test_archives_with_several_folders_are_read_when_asked(tmp_path):
    path = _write_tar(tmp_path / "set.tar", {"s/a/0.png": PNG, "s/b/0.png": PNG})
    assert list(open_images([path], recursive=True).names) == ["a/0.png", "b/0.png"]


MANIFESTS = {
    "labels.csv": "file,label\n" + "".join(f"{n},{i}\n" for i, n in enumerate(NAMES)),
    "labels.json": json.dumps({n: i for i, n in enumerate(NAMES)}),
}


@pytest.mark.parametrize(
    ("manifest", "kind"),
    [("labels.csv", "folder"), ("labels.json", "zip"), ("labels.csv", "beside")],
)
def test_a_manifest_is_found(manifest, kind, tmp_path):
    files = _pngs() | ({} if kind == "beside" else {manifest: MANIFESTS[manifest]})
    if kind == "beside":
        (tmp_path / manifest).write_text(MANIFESTS[manifest])
    write = _write_folder if kind == "folder" else _write_zip
    images = open_images([write(tmp_path / ("set" if kind == "folder" else "set.zip"), files)])
    assert images.labels.tolist() == list(range(7))
    assert images.ignored == []


@pytest.mark.parametrize("base", ["", "samples/"])
@pytest.mark.parametrize("write", [_write_zip, _write_tar], ids=["zip", "tar"])
def test_a_manifest_may_stand_beside_the_folder_in_an_archive(write, base, tmp_path):
    rows = "file,label\n" + "".join(f"{base}{name},{i}\n" for i, name in enumerate(NAMES))
    files = {f"samples/{k}": v for k, v in _pngs().items()} | {"labels.csv": rows, "note": "x"}
    images = open_images([write(tmp_path / f"set.{write.__name__[-3:]}", files)])
    assert images.labels.tolist() == list(range(7))
    assert images.ignored == ["note"]


def test_linked_folders_are_read_once(tmp_path):
    real = _write_folder(tmp_path / "elsewhere", {"x.png": PNG, "y.png": PNG})
    folder = _write_folder(tmp_path / "set", {"a/0.png": PNG})
    (folder / "b").symlink_to(real)
    (folder / "c").symlink_to(folder / "a")
    (real / "up").symlink_to(folder)
    images = open_images([folder], recursive=True)
    assert images.names == ["a/0.png", "b/x.png", "b/y.png"]
    assert images.ignored == ["b/up/", "c/"]


def test_a_pipe_is_left_out_and_does_not_hang(tmp_path):
    folder = _write_folder(tmp_path / "set", _pngs())
    os.mkfifo(folder / "pipe.png")
    images = open_images([folder])
    assert (images.names, images.ignored) == (NAMES, ["pipe.png"])
    with pytest.raises(DimoError, match="a pipe or a device"):
        open_images([folder / "pipe.png"])


def test_one_manifest_serves_all_shards_beside_it(tmp_path):
    (tmp_path / "labels.csv").write_text(MANIFESTS["labels.csv"])
    first = _write_zip(tmp_path / "a.zip", _pngs(PIXELS[:3], NAMES[:3]))
    last = _write_zip(tmp_path / "b.zip", _pngs(PIXELS[3:], NAMES[3:]))
    assert open_images([last, first]).labels.tolist() == [3, 4, 5, 6, 0, 1, 2]


@pytest.mark.parametrize("suffix", ["cls", "json"])
def test_webdataset_labels(suffix, tmp_path):
    files = {}
    for i, (name, data) in enumerate(_pngs().items()):
        text = f"{i + 3}\n" if suffix == "cls" else json.dumps({"label": i + 3, "prompt": "a"})
        files |= {name: data, f"{name[:-4]}.{suffix}": text}
    images = open_images([_write_tar(tmp_path / "shard.tar", files)])
    assert images.labels.tolist() == list(range(3, 10))
    assert images.ignored == []


def test_webdataset_json_without_labels_is_no_label(tmp_path):
    files = {"0.png": PNG, "0.json": '{"prompt": "a"}'}
    images = open_images([_write_tar(tmp_path / "shard.tar", files)])
    assert images.labels is None
    assert images.ignored == []


def test_a_rule_goes_before_labels_that_come_along_even_bad_ones(tmp_path):
    files = {"0.png": PNG, "1.png": PNG, "1.cls": "3"}
    path = _write_tar(tmp_path / "shard.tar", files)
    assert open_images([path], labels="cyclic:5").labels.tolist() == [0, 1]
    path = _npz(tmp_path / "set.npz", arr_0=PIXELS, arr_1=np.zeros(2))
    assert open_images([path], labels="cyclic:5").labels.tolist() == [0, 1, 2, 3, 4, 0, 1]


def test_labels_by_rule(tmp_path):
    unlabelled = open_images([_npz(tmp_path / "x.npz", arr_0=PIXELS, arr_1=np.arange(7))])
    assert (unlabelled.labels.tolist(), unlabelled.labels_given) == (list(range(7)), False)
    assert open_images([tmp_path / "x.npz"], labels="none").labels is None
    named = _write_folder(tmp_path / "n", _pngs(names=[f"{i:06d}_{i * 9}.png" for i in range(7)]))
    assert open_images([named], labels="filename").labels.tolist() == [0, 9, 18, 27, 36, 45, 54]
    folder = _write_folder(tmp_path / "c", _pngs())
    assert open_images([folder], labels="cyclic:3").labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    (tmp_path / "mine.csv").write_text("seed,label,file\n" + "".join(f"1,4,{n}\n" for n in NAMES))
    rule = str(tmp_path / "mine.csv")
    assert open_images([folder], labels=rule).labels.tolist() == [4] * 7


# what a file becomes ---------------------------------------------------------------------------


def _png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png_of_16_bit_rgb():
    header = struct.pack(">IIBBBBB", 20, 16, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(range(120)) for _ in range(16))
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return PNG[:8] + b"".join(_png_chunk(*chunk) for chunk in chunks)


def _with_chunk(png, name, data):
    """Puts a chunk between the header and the rest."""
    return png[:33] + _png_chunk(name, data) + png[33:]


GREY = RGB.convert("L")
CONVERSIONS = {  # bytes, what they must become, mode, codec
    "png": (PNG, RGB, "RGB", "png"),
    "grey": (_encode(GREY), GREY, "L", "png"),
    "bits": (_encode(RGB.convert("1")), RGB.convert("1"), "1", "png"),
    "palette": (_encode(RGB.quantize(64)), RGB.quantize(64), "P", "png"),
    "opaque RGBA": (_encode(RGB.convert("RGBA")), RGB, "RGBA", "png"),
    "opaque LA": (_encode(GREY.convert("LA")), GREY, "LA", "png"),
    "opaque palette": (
        _encode(RGB.quantize(64), transparency=bytes([255] * 64)),
        RGB.quantize(64),
        "P",
        "png",
    ),
    "bmp": (_encode(RGB, "BMP"), RGB, "RGB", "bmp"),
    "tiff": (_encode(RGB, "TIFF", compression="tiff_lzw"), RGB, "RGB", "tiff"),
    "lossless webp": (_encode(RGB, "WEBP", lossless=True), RGB, "RGB", "webp-lossless"),
}


@pytest.mark.parametrize("case", CONVERSIONS)
def test_what_is_taken_without_loss(case):
    data, expected, mode, codec = CONVERSIONS[case]
    info = inspect_image(data)
    assert (info.height, info.width, info.mode, info.codec) == (16, 20, mode, codec)
    assert info.problem is None
    assert np.array_equal(decode_image(data), np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize(
    ("codec", "options", "named"),
    [("JPEG", {}, "jpeg"), ("WEBP", {}, "webp"), ("TIFF", {"compression": "jpeg"}, "tiff-jpeg")],
)
def test_lossy_codecs_are_told_by_content(codec, options, named):
    info = inspect_image(_encode(RGB, codec, **options))
    assert (info.codec, info.mode, info.problem) == (named, "RGB", None)


TRANSPARENT = Image.fromarray(_noise(1, channels=4)[0])
SEE_THROUGH = tuple(int(v) for v in PIXELS[0, 0, 0])
BAD_IMAGES = {
    "empty": (b"", "zero bytes"),
    "text": (b"these are no pixels", "not an image"),
    "gif": (_encode(RGB, "GIF"), "not an image"),
    "half a PNG": (PNG[: len(PNG) // 2], "cut short"),
    "PNG without its last byte": (PNG[:-1], "cut short"),
    "PNG signature": (PNG[:8], "cut short"),
    "flipped bit": (PNG[:200] + bytes([PNG[200] ^ 1]) + PNG[201:], "checksum error in its IDAT"),
    "no IDAT": (PNG[:33] + _png_chunk(b"IEND", b""), "no pixels"),
    "half a JPEG": (_encode(RGB, "JPEG")[:500], "damaged"),
    "half a BMP": (_encode(RGB, "BMP")[:500], "damaged"),
    "16-bit grey": (_encode(Image.fromarray(np.zeros((16, 20), np.uint16))), "mode I;16"),
    "16-bit RGB": (_png_of_16_bit_rgb(), "mode RGB;16"),
    "CMYK JPEG": (_encode(RGB.convert("CMYK"), "JPEG"), "mode CMYK"),
    "float TIFF": (_encode(GREY.convert("F"), "TIFF"), "mode F"),
    "transparent RGBA": (_encode(TRANSPARENT), "mode RGBA with transparent pixels"),
    "transparent LA": (_encode(TRANSPARENT.convert("LA")), "mode LA with transparent pixels"),
    "transparent WebP": (_encode(TRANSPARENT, "WEBP"), "mode RGBA with transparent pixels"),
    "transparent palette": (
        _encode(RGB.quantize(64), transparency=bytes([0] * 64)),
        "mode P with transparent pixels",
    ),
    "transparent colour": (_encode(RGB, transparency=SEE_THROUGH), "mode RGB with transparent"),
    "animated PNG": (_encode(RGB, save_all=True, append_images=[GREY.convert("RGB")]), "2 frames"),
    "two pages": (_encode(RGB, "TIFF", save_all=True, append_images=[RGB.copy()]), "2 frames"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_image_is_a_problem(case):
    data, expected = BAD_IMAGES[case]
    assert expected in inspect_image(data).problem
    if case in ("no IDAT", "flipped bit", "PNG without its last byte"):
        return  # inspection is the stricter of the two
    with pytest.raises(DimoError):
        decode_image(data)


@pytest.mark.parametrize("write", [_write_folder, _write_tar])
def test_a_bad_image_is_a_problem_of_its_own(write, tmp_path):
    data, expected = BAD_IMAGES["CMYK JPEG"]
    images = open_images([write(tmp_path / "set.tar", _pngs() | {"003.png": data})])
    problems = [info.problem for info in _scan(images)]
    assert expected in problems.pop(3)
    assert problems == [None] * 6
    assert len(images.load(range(4, 7))) == 3
    with pytest.raises(DimoError, match=r"'003\.png' in .*set"):
        images.load(range(7))


def test_every_truncation_is_noticed():
    for data in (PNG, _encode(RGB, "JPEG"), _encode(RGB, "WEBP"), _encode(RGB, "BMP")):
        for length in range(0, len(data), 7):
            assert inspect_image(data[:length]).problem is not None, length


def test_copies_have_one_hash_whatever_is_written_beside_the_pixels():
    dated = _with_chunk(PNG, b"tEXt", b"seed\x0017")
    assert dated != PNG
    assert inspect_image(dated).sha256 == inspect_image(PNG).sha256
    assert inspect_image(_encode(PIXELS[1])).sha256 != inspect_image(PNG).sha256
    keyed = _with_chunk(PNG, b"tRNS", b"\0\1\0\2\0\3")
    assert inspect_image(keyed).sha256 != inspect_image(PNG).sha256


def test_a_missing_file_is_a_problem_of_its_own(tmp_path):
    folder = _write_folder(tmp_path / "set", _pngs())
    images = open_images([folder])
    (folder / NAMES[2]).unlink()
    assert [n for n, i in enumerate(_scan(images)) if i.problem] == [2]
    with pytest.raises(DimoError, match=r"002\.png"):
        images.load(range(7))


def test_mixed_sizes_are_named(tmp_path):
    files = _pngs() | {"005.png": _encode(_noise(1, 8, 9)[0])}
    images = open_images([_write_folder(tmp_path / "set", files)])
    assert [i.problem for i in _scan(images)] == [None] * 7
    with pytest.raises(DimoError, match=r"2 sizes.*16 x 20 in 6 .*8 x 9 in 1 image .*005\.png"):
        images.load(range(7))


def test_a_damaged_array_is_told_from_where_it_is_damaged(tmp_path):
    path = _npz(tmp_path / "set.npz", compressed=True, arr_0=_noise(50))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    images = open_images([path])
    problems = [info.problem for info in _scan(images)]
    bad = [number for number, problem in enumerate(problems) if problem]
    assert bad
    assert bad == list(range(bad[0], 50))
    with pytest.raises(DimoError, match="damaged"):
        images.load(range(50))


def test_a_flipped_bit_in_a_stored_array_fails_its_checksum(tmp_path):
    path = _npz(tmp_path / "set.npz", arr_0=PIXELS)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    problems = [info.problem for info in _scan(open_images([path]))]
    assert problems[0] is None
    assert "CRC" in problems[6]


def test_grey_arrays_are_grey(tmp_path):
    grey = _noise(channels=1)
    images = open_images([_npz(tmp_path / "set.npz", arr_0=grey)])
    assert {i.mode for i in _scan(images)} == {"L"}
    assert torch.equal(
        images.load(range(7)), torch.from_numpy(grey).permute(0, 3, 1, 2).repeat(1, 3, 1, 1)
    )


def test_npy_headers_of_both_versions(tmp_path):
    for version in ((1, 0), (2, 0)):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, PIXELS, version=version)
        path = _write_zip(tmp_path / f"{version[0]}.npz", {"arr_0.npy": buffer.getvalue()})
        assert torch.equal(
            open_images([path]).load(range(7)), torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
        )


# bad input ---------------------------------------------------------------------------------------


def _truncated(path, share=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def _short_array(tmp):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, PIXELS)
    return _write_zip(tmp / "set.npz", {"arr_0.npy": buffer.getvalue()[:-100]})


def _encrypted(tmp):
    """A stored zip whose flags say that it is encrypted."""
    path = _write_zip(tmp / "set.zip", {"0.png": PNG})
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    return path


def _twice(tmp):
    path = _write_zip(tmp / "set.zip", {"0.png": PNG, "1.png": PNG})
    path.write_bytes(path.read_bytes().replace(b"1.png", b"0.png"))
    return path


def _linked(tmp):
    path = _write_tar(tmp / "a.tar", {"0.png": PNG})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        archive.addfile(link)
    return path


def _damaged_tar(tmp):
    """tarfile itself takes a damaged header for the end."""
    path = _write_tar(tmp / "a.tar", {"0.png": PNG, "1.png": PNG})
    data = bytearray(path.read_bytes())
    data[data.index(b"1.png")] ^= 1
    path.write_bytes(data)
    return path


def _manifest(tmp, text, name="labels.csv"):
    return _write_folder(tmp / "set", _pngs() | {name: text})


def _labelled(tmp, **arrays):
    return _npz(tmp / "set.npz", arr_0=PIXELS, **arrays)


ROWS = "file,label\n" + "".join(f"{name},1\n" for name in NAMES)
BAD_SETS = {  # makes the paths, what the message must say, the labels asked for
    "no path": (lambda tmp: [], "no paths", ""),
    "missing": (lambda tmp: tmp / "nowhere", "nowhere: it does not exist", ""),
    "empty folder": (
        lambda tmp: _write_folder(tmp / "set", {"a/b": ""}).parent / "set" / "a",
        r"holds no images, but 1 other file \('b'\)",
        "",
    ),
    "only folders": (lambda tmp: _write_folder(tmp / "set", {"a/0.png": PNG}), "--recursive", ""),
    "one image": (lambda tmp: _write_folder(tmp, _pngs()) / "000.png", "no set of images", ""),
    "zip without images": (lambda tmp: _write_zip(tmp / "a.zip", {"a.txt": ""}), "no images", ""),
    "zip with a name twice": (_twice, "more than once", ""),
    "zip with folders": (
        lambda tmp: _write_zip(tmp / "a.zip", {"a/0.png": PNG, "b/0.png": PNG}),
        r"2 folders \('a', 'b'\).*--recursive",
        "",
    ),
    "truncated zip": (
        lambda tmp: _truncated(_write_zip(tmp / "a.zip", _pngs())),
        "no zip file, or cut short",
        "",
    ),
    "encrypted zip": (_encrypted, "encrypted", ""),
    "truncated tar": (
        lambda tmp: _truncated(_write_tar(tmp / "a.tar", _pngs()), 0.4),
        "cut short",
        "",
    ),
    "text as tar": (lambda tmp: _write_folder(tmp, {"a.tar": "hi" * 999}) / "a.tar", "cannot", ""),
    "compressed tar": (
        lambda tmp: _write_tar(tmp / "a.tar.gz", _pngs(), "w:gz"),
        "compressed tar",
        "",
    ),
    "compressed tar, named .tar": (
        lambda tmp: _write_tar(tmp / "a.tar", _pngs(), "w:xz"),
        "compressed tar",
        "",
    ),
    "shard with a label missing": (
        lambda tmp: _write_tar(tmp / "a.tar", {"0.png": PNG, "1.png": PNG, "1.cls": "3"}),
        r"none in 1 of 2 \('0\.cls'\)",
        "",
    ),
    "shard with a word as label": (
        lambda tmp: _write_tar(tmp / "a.tar", {"0.png": PNG, "0.cls": "cat"}),
        "'cat'",
        "",
    ),
    "shard with a broken json": (
        lambda tmp: _write_tar(tmp / "a.tar", {"0.png": PNG, "0.json": "{"}),
        r"cannot read '0\.json'",
        "",
    ),
    "shard with a link": (_linked, "'1.png' is a link", ""),
    "damaged header in a tar": (_damaged_tar, "cut short or damaged", ""),
    "statistics": (
        lambda tmp: _npz(tmp / "a.npz", mu=np.zeros(2), sigma=np.eye(2)),
        "but mu, sigma",
        "",
    ),
    "float images": (
        lambda tmp: _npz(tmp / "a.npz", arr_0=PIXELS / 255.0),
        "float64.*allowed: uint8",
        "",
    ),
    "channels first": (
        lambda tmp: _npz(tmp / "a.npz", arr_0=PIXELS.transpose(0, 3, 1, 2).copy()),
        "transpose",
        "",
    ),
    "RGBA array": (lambda tmp: _npz(tmp / "a.npz", arr_0=_noise(channels=4)), "16, 20, 4", ""),
    "no rows": (lambda tmp: _npz(tmp / "a.npz", arr_0=PIXELS[:0]), r"\[0, 16, 20, 3\]", ""),
    "objects": (
        lambda tmp: _npz(tmp / "a.npz", arr_0=np.array([None, {}], dtype=object)),
        "object",
        "",
    ),
    "truncated npz": (lambda tmp: _truncated(_labelled(tmp)), "no zip file, or cut short", ""),
    "short array": (_short_array, r"6,620 bytes, not 6,720", ""),
    "labels of another length": (
        lambda tmp: _labelled(tmp, arr_1=np.arange(3)),
        r"int64 \[3\]",
        "",
    ),
    "real labels": (lambda tmp: _labelled(tmp, labels=np.zeros(7)), "float64", ""),
    "pickled labels": (
        lambda tmp: _labelled(tmp, arr_1=np.array([None] * 7, dtype=object)),
        "Object arrays",
        "",
    ),
    "same names": (
        lambda tmp: [_write_folder(tmp / n, _pngs()) for n in "ab"],
        "both hold '000.png'",
        "",
    ),
    "same path": (lambda tmp: [_labelled(tmp)] * 2, "both hold", ""),
    "labels in one shard": (
        lambda tmp: [_manifest(tmp, ROWS), _npz(tmp / "a.npz", arr_0=PIXELS)],
        "no labels in .*a.npz",
        "",
    ),
    "unknown rule": (lambda tmp: _labelled(tmp), "did you mean 'filename'", "filenames"),
    "cyclic by nothing": (lambda tmp: _labelled(tmp), "unknown labels 'cyclic:0'", "cyclic:0"),
    "names without labels": (lambda tmp: _manifest(tmp, ROWS), "7 of 7 names", "filename"),
    "unpadded names": (
        lambda tmp: _write_folder(tmp / "s", _pngs(PIXELS[:2], ["2.png", "10.png"])),
        r"'10\.png' comes before '2\.png'",
        "cyclic:2",
    ),
    "no such manifest": (lambda tmp: _labelled(tmp), "cannot read none.csv", "none.csv"),
    "manifest misses a file": (
        lambda tmp: _manifest(tmp, ROWS.replace("004.png,1\n", "")),
        "'004.png'",
        "",
    ),
    "manifest names another": (
        lambda tmp: _manifest(tmp, ROWS + "9.png,1\n"),
        r"names 1 file not.*'9\.png'",
        "",
    ),
    "manifest names one twice": (
        lambda tmp: _manifest(tmp, ROWS + "000.png,2\n"),
        "'000.png' more than once",
        "",
    ),
    "manifest with a word": (
        lambda tmp: _manifest(tmp, ROWS.replace("002.png,1", "002.png,cat")),
        r"'002\.png' in .*'cat'; allowed: an integer",
        "",
    ),
    "manifest with a fraction": (
        lambda tmp: _manifest(tmp, '{"000.png": 1.5}', "labels.json"),
        "label 1.5",
        "",
    ),
    "manifest with a huge label": (
        lambda tmp: _manifest(tmp, '{"000.png": %s}' % ("9" * 30), "labels.json"),
        "integer",
        "",
    ),
    "manifest without header": (
        lambda tmp: _manifest(tmp, "000.png,1\n"),
        "columns 000.png, 1; allowed",
        "",
    ),
    "manifest with a short row": (lambda tmp: _manifest(tmp, ROWS + "007.png\n"), "label None", ""),
    "manifest of a list": (lambda tmp: _manifest(tmp, "[1]", "labels.json"), "no table", ""),
    "manifest of no text": (
        lambda tmp: _write_folder(tmp / "set", _pngs() | {"labels.csv": b"\xff\xfe\x00"}),
        "cannot read",
        "",
    ),
    "two manifests": (lambda tmp: _write_folder(tmp / "set", _pngs() | MANIFESTS), "keep one", ""),
}


@pytest.mark.parametrize("case", BAD_SETS)
def test_a_bad_set_is_one_error(case, tmp_path):
    make, expected, labels = BAD_SETS[case]
    paths = make(tmp_path)
    with pytest.raises(DimoError, match=expected) as caught:
        open_images(paths if isinstance(paths, list) else [paths], labels=labels)
    message = str(caught.value)
    assert "\n" not in message
    assert ";" in message


# features ----------------------------------------------------------------------------------------

FEATURES = np.random.default_rng(3).normal(size=(6, 4))


def test_features_are_read(tmp_path):
    labels = np.arange(6, dtype=np.int32)
    path = _npz(tmp_path / "f.npz", features=FEATURES, spatial=FEATURES[:, :2], labels=labels, x=1)
    found = read_features(path)
    assert found.features.dtype == np.float32
    assert np.array_equal(found.features, FEATURES.astype(np.float32))
    assert found.spatial.shape == (6, 2)
    assert found.logits is None
    assert found.labels.dtype == np.int64
    assert found.labels.tolist() == [0, 1, 2, 3, 4, 5]


BAD_FEATURES = {
    "missing key": ({"mu": FEATURES}, r"lacks features \(it has: mu\)"),
    "shape": ({"features": FEATURES[0]}, r"shape \[4\]"),
    "NaN": ({"features": np.where(FEATURES[2, 1] == FEATURES, np.nan, FEATURES)}, "1 NaN"),
    "too large": ({"features": FEATURES * 1e200}, "in float32.*infinite"),
    "words": ({"features": np.array([["a"]])}, "dtype"),
    "rows": ({"features": FEATURES, "logits": FEATURES[:5]}, "logits .* 5 rows.*6"),
    "labels": ({"features": FEATURES, "labels": FEATURES[:, 0]}, "float64"),
    "objects": ({"features": np.array([None], dtype=object)}, "Object arrays"),
}


@pytest.mark.parametrize("case", BAD_FEATURES)
def test_bad_features_are_one_error(case, tmp_path):
    arrays, expected = BAD_FEATURES[case]
    with pytest.raises(DimoError, match=expected):
        read_features(_npz(tmp_path / "f.npz", **arrays))


def test_no_or_truncated_features_are_one_error(tmp_path):
    with pytest.raises(DimoError, match="No such file"):
        read_features(tmp_path / "f.npz")
    path = _truncated(_npz(tmp_path / "f.npz", features=FEATURES))
    with pytest.raises(DimoError, match="cannot read features"):
        read_features(path)
    np.save(tmp_path / "f.npy", FEATURES)
    with pytest.raises(DimoError, match="cannot read features"):
        read_features(tmp_path / "f.npy")


# memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_arrays_are_streamed(compression, tmp_path, monkeypatch):
    """Images are read one by one, each once: no read asks for more than one of them."""
    pixels = np.arange(150, dtype=np.uint8)[:, None, None, None] + np.zeros((16, 20, 3), np.uint8)
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    path = _write_zip(tmp_path / "a.npz", {"arr_0.npy": buffer.getvalue()}, compression)
    sizes = []
    read = zipfile.ZipExtFile.read
    monkeypatch.setattr(
        zipfile.ZipExtFile, "read", lambda file, n=-1: sizes.append(n) or read(file, n)
    )
    images = open_images([path])
    row = 16 * 20 * 3
    infos = images.scan(range(150), lambda done: None)
    assert len({info.sha256 for info in infos}) == 150
    assert min(sizes) > 0
    assert max(sizes) == row
    assert sizes.count(row) == 150
    for start in range(0, 150, 64):
        batch = images.load(range(start, min(start + 64, 150)))
        assert batch[:, 0, 0, 0].tolist() == list(range(start, min(start + 64, 150)))
    assert sizes.count(row) == 300


def test_only_a_handful_of_images_is_on_its_way():
    drawn = itertools.count()
    results = _ordered_map(lambda item: item, (next(drawn) for _ in range(1000)))
    assert next(results) == 0
    assert next(drawn) < 40
    assert list(results)[-1] > 900
