"""Conversion to safetensors, bit for bit, and what `check` finds wrong with files."""

import hashlib
import json
import shutil

import pytest
import torch
import yaml

from bench.features.vision import VISION
from bench.protocol import list_protocols
from bench.protocol.catalog import ANY
from bench.protocol.networks import EXTRACTORS
from dimo.errors import DimoError
from dimo.methods.di4c.network import Di4CStudent
from dimo.models.halton import HaltonMaskGIT
from dimo.models.maskgit import MaskGIT
from dimo.models.vqgan import VQGAN, LlamaGenVQ
from dimo.weights.catalog import ASSETS, OFFICIAL, OfficialFile, destination, find, locate, name_of
from dimo.weights.convert import _loaders, check, convert, official_networks
from dimo.weights.download import fetch
from dimo.weights.files import (
    check_state,
    load_metadata,
    read_state_dict,
    save_tensors,
    state_sha256,
)

TEXTS = (".yaml", ".json", ".txt")  # official files that are not weights

# network, golden file, container of the trainer that writes it, name it is published under
LAYOUTS = {
    "maskgit": (MaskGIT, "maskgit_v1_transformer.official.pth", None, "net.pth"),
    "dimo": (MaskGIT, "maskgit_v1_transformer.dimo_pytorch_model.bin", None, "pytorch_model.bin"),
    "vqgan": (VQGAN, "taming_vqgan_f16.last.ckpt", None, "last.ckpt"),
    "halton": (
        HaltonMaskGIT,
        "halton_transformer.weights.safetensors",
        "model_state_dict",
        "ImageNet_256_tiny.pth",
    ),
    "llamagen": (
        LlamaGenVQ,
        "halton_llamagen_vq.weights.safetensors",
        "model",
        "vq_ds16_c2i.pt",
    ),
    "di4c": (
        Di4CStudent,
        "di4c_student_transformer.weights.safetensors",
        "model_state_dict",
        "maskgit-di4c-d.pth",
    ),
}


@pytest.fixture
def published(golden, golden_file, golden_constructor, tmp_path):
    """Writes the file of a layout as its trainer would; gives it, its class and arguments."""

    def make(layout):
        cls, golden_name, container, name = LAYOUTS[layout]
        case = golden_name.split(".")[0]
        path = tmp_path / "official" / name
        path.parent.mkdir(exist_ok=True)
        if container is None:
            shutil.copy(golden_file(golden_name), path)
        else:
            state = read_state_dict(golden_file(golden_name))
            torch.save({container: state, "optimizer_state_dict": {"lr": 1}, "iter": 3}, path)
        if cls is VQGAN:
            config = json.loads((golden / f"{case}.config.json").read_text())
            path.with_name("model.yaml").write_text(yaml.safe_dump(config))
        arguments = dict(golden_constructor[case])
        arguments.pop("is_student", None)
        return path, cls, arguments

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_converted_file_loads_bit_for_bit(published, layout, tmp_path):
    path, cls, arguments = published(layout)
    result, metadata = convert(path, tmp_path / "out")
    assert result == tmp_path / "out" / f"{path.stem}.safetensors"
    one, other = (cls.from_official(p, **arguments).state_dict() for p in (path, result))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert all(one[key].dtype == other[key].dtype for key in one)
    assert load_metadata(result) == metadata
    assert metadata["source_file"] == path.name
    assert metadata["source_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert metadata["state_sha256"] == state_sha256(read_state_dict(result)) == state_sha256(one)
    assert ("config" in metadata) == (layout == "vqgan")
    other_name = result.rename(tmp_path / "mine.safetensors")  # not checked as the full-size one
    (found,) = check([str(other_name)], tmp_path)
    assert not found.problems
    assert found.origin == "converted"


def test_a_converted_vqgan_holds_its_configuration_and_no_training(published, tmp_path):
    path, _, _ = published("vqgan")
    content = torch.load(path, weights_only=False)
    content["state_dict"]["loss.discriminator.main.0.weight"] = torch.zeros(3)
    content["state_dict"]["loss.discriminator.main.1.num_batches_tracked"] = torch.tensor(7)
    torch.save(content, path)
    config = path.with_name("model.yaml").rename(tmp_path / "mine.yaml")
    with pytest.raises(DimoError, match="needs its configuration"):
        convert(path, tmp_path / "out")
    result, metadata = convert(path, tmp_path / "out", config=config)
    dropped = [key for key in read_state_dict(path) if key.startswith(("loss.", "colorize"))]
    assert metadata["dropped"] == len(dropped) >= 2
    assert not any(key.startswith("loss.") for key in read_state_dict(result))
    assert VQGAN.from_file(result).codebook_size == 20
    config.write_text("model: {params: {n_embed: 21}}")
    with pytest.raises(DimoError, match="file and configuration belong together"):
        convert(path, tmp_path / "other", config=config)


def test_what_cannot_be_converted_is_named(published, tmp_path):
    path, _, _ = published("maskgit")
    out = tmp_path / "out"
    result, _ = convert(path, out)
    with pytest.raises(DimoError, match="exists; replace it with --force"):
        convert(path, out)
    before = result.read_bytes()
    convert(path, out, force=True)
    assert result.read_bytes() == before
    with pytest.raises(DimoError, match=r"is safetensors already, converted from net\.pth"):
        convert(result, tmp_path / "again")
    with pytest.raises(DimoError, match="is safetensors already; use it as it is"):
        convert(ASSETS / "digits-tokenizer.safetensors", out)
    with pytest.raises(DimoError, match="--config is for a taming VQGAN"):
        convert(path, tmp_path / "again", config=tmp_path / "model.yaml")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "foreign.pth")
    with pytest.raises(DimoError, match=r"no network that dimo knows \(1 tensors, e\.g\. weight"):
        convert(tmp_path / "foreign.pth", out)
    with pytest.raises(DimoError, match="no weights file"):
        convert(tmp_path / "gone.pth", out)
    (tmp_path / "short.pth").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DimoError, match="cannot read weights"):
        convert(tmp_path / "short.pth", out)
    with pytest.raises(DimoError, match="cannot write"):
        convert(path, path / "folder")
    assert sorted(p.name for p in out.iterdir()) == ["net.safetensors"]


# --- check ----------------------------------------------------------------------------------------


@pytest.fixture
def row(monkeypatch):
    """Sets what is published of an official file."""

    def change(name, path, **known):
        old = OFFICIAL[name]
        known = {"size": path.stat().st_size, **known}
        new = OfficialFile(old.source, old.path, old.contents, old.licence, **known)
        monkeypatch.setitem(OFFICIAL, name, new)

    return change


def problems(*names, folder):
    return [problem for finding in check(names, folder) for problem in finding.problems]


def test_an_official_name_needs_the_full_size_network(published, row, tmp_path):
    path, _, _ = published("llamagen")
    row("llamagen-vq16", path)
    (problem,) = problems("llamagen-vq16", folder=path.parent)
    assert "do not fit LlamaGenVQ" in problem
    assert problems(str(path), folder=tmp_path) == [problem]  # by its name


def full_size(network):
    with torch.device("meta"):
        state = network().state_dict()
    return {key: torch.zeros_like(value, device="cpu") for key, value in state.items()}


def test_a_whole_official_file_is_found_in_order(row, tmp_path):
    path = tmp_path / "ImageNet_256_tiny.pth"
    torch.save({"model_state_dict": full_size(official_networks()["halton-tiny-256"])}, path)
    row("halton-tiny-256", path)
    (found,) = check([], tmp_path)
    assert (found.name, found.path, found.problems) == ("halton-tiny-256", path, [])
    assert found.origin == "not known"
    assert "every key and shape of the Halton-MaskGIT transformer" in found.structure
    (tmp_path / f"{path.name}.sha256").write_text(f"{found.sha256}  {path.name}\n")
    assert check([], tmp_path)[0].origin == "recorded"
    row("halton-tiny-256", path, sha256=found.sha256)
    assert check([], tmp_path)[0].origin == "published"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    wrong = problems("halton-tiny-256", folder=tmp_path)
    assert len(wrong) == 2
    assert "is recorded" in wrong[0]
    assert "is published" in wrong[1]
    path.write_bytes(data[: len(data) // 2])
    wrong = problems("halton-tiny-256", folder=tmp_path)
    assert "are published" in wrong[0]
    assert "cannot read weights" in wrong[-1]


def test_every_transformer_and_tokenizer_has_its_network():
    extractors = {"inception", "inception-torchscript", "dinov2-vit-l-14", "clip-vit-l-14-336"}
    extractors |= {"hps-v2.0", "hps-v2.1", "alexnet", "lpips", *VISION}
    texts = {name for name, row in OFFICIAL.items() if row.path.endswith(TEXTS)}
    networks = official_networks()
    assert set(OFFICIAL) - extractors - texts <= {*networks, *_loaders()}
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in build().parameters()) for name, build in networks.items()
        }
    assert round(sizes["maskgit-256"] / 1e6, 3) == 174.161
    assert sizes["maskgit-512"] > sizes["maskgit-256"] == sizes["dimo-maskgit"] < sizes["di4c-d"]
    assert sizes["halton-small-384"] - sizes["halton-small-256"] == (24**2 - 16**2) * 512


def test_other_files_are_checked_as_far_as_their_sizes_are_known(published, tmp_path):
    for layout in ("maskgit", "vqgan"):
        (found,) = check([str(published(layout)[0])], tmp_path)
        assert not found.problems
        assert "every key and shape of the" in found.structure
    for name in ("digits-teacher", "digits-tokenizer", "scenes-tokenizer"):
        (found,) = check([str(ASSETS / f"{name}.safetensors")], tmp_path)
        assert "every key and shape of the" in found.structure
    (found,) = check([str(ASSETS / "digits-cnn.safetensors")], tmp_path)
    assert found.structure.endswith("looks like a digits feature extractor; keys not checked")
    save_tensors(tmp_path / "x.safetensors", {"weight": torch.zeros(2, 3)})
    (found,) = check([str(tmp_path / "x.safetensors")], tmp_path)
    expected = "1 tensors, 6 numbers, of no network that dimo knows; keys not checked"
    assert found.structure == expected


def test_a_missing_key_of_another_file_is_found(published, tmp_path):
    path, _, _ = published("maskgit")
    state = read_state_dict(path)
    for key in ("last_layer.0.weight", "pos_emb", "transformer.layers.1.0.norm.weight"):
        part = {k: v for k, v in state.items() if k != key}
        torch.save(part, tmp_path / "part.pth")
        (problem,) = problems(str(tmp_path / "part.pth"), folder=tmp_path)
        assert "missing" in problem
        assert key in problem or "pos_emb" in key


def test_a_changed_converted_file_is_found(published, tmp_path):
    path, _, _ = published("vqgan")
    result, metadata = convert(path, tmp_path)
    state = read_state_dict(result)
    state["quantize.embedding.weight"][0, 0] += 1
    save_tensors(result, state, metadata)
    (problem,) = problems(str(result), folder=tmp_path)
    assert "not those that were converted" in problem


def test_a_file_converted_from_another_version_is_found(published, row, tmp_path):
    path, _, _ = published("halton")
    row("halton-tiny-256", path, sha256="0" * 64)
    convert(path, tmp_path)
    wrong = problems("halton-tiny-256", folder=tmp_path)
    assert "converted from a file of sha256" in wrong[0]


def test_missing_files_and_unknown_names(tmp_path):
    (problem,) = problems("maskgit-256", folder=tmp_path)
    assert "dimo weights fetch maskgit-256" in problem
    with pytest.raises(DimoError, match=r"did you mean 'maskgit-512'.*give the path of a file"):
        check(["maskgit-51"], tmp_path)
    with pytest.raises(DimoError, match="no official file is in"):
        check([], tmp_path)


def test_extractors_and_the_configuration(tmp_path, golden):
    (tmp_path / "ViT-L-14-336px.pt").write_bytes(b"x")
    (problem,) = problems("clip-vit-l-14-336", folder=tmp_path)
    assert OFFICIAL["clip-vit-l-14-336"].sha256 in problem
    config = destination("maskgit-vqgan-config", tmp_path)
    config.parent.mkdir(parents=True)
    config.write_text("model: {params: {}}")
    (found,) = check(["maskgit-vqgan-config"], tmp_path)
    assert found.structure == "configuration of a VQGAN with 1024 codes"
    config.write_text("model: {params: {n_embed: a}}")
    assert "must be an integer" in problems("maskgit-vqgan-config", folder=tmp_path)[0]


def test_shards_become_one_file(golden_file, tmp_path):
    state = read_state_dict(golden_file("halton_transformer.weights.safetensors"))
    keys = list(state)
    for number, part in enumerate((keys[::2], keys[1::2]), 1):
        name = f"net-0000{number}-of-00002.safetensors"
        save_tensors(tmp_path / "shards" / name, {key: state[key] for key in part})
    (found,) = check([str(tmp_path / "shards")], tmp_path)
    assert not found.problems
    assert "Halton-MaskGIT" in found.structure
    result, metadata = convert(tmp_path / "shards", tmp_path / "out")
    assert result.name == "net.safetensors"
    assert metadata["state_sha256"] == state_sha256(read_state_dict(result)) == state_sha256(state)


# --- places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["maskgit-256", "maskgit-vqgan", "meissonic-merges"])
def test_what_is_fetched_or_converted_is_found(name, tmp_path):
    with pytest.raises(DimoError, match=f"dimo weights fetch {name}$"):
        locate(name, tmp_path)
    path = destination(name, tmp_path)
    assert name_of(path) == name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"official")
    assert locate(name, tmp_path) == path
    assert [other for other in OFFICIAL if find(other, tmp_path)] == [name]
    converted = path.with_suffix(".safetensors")
    converted.write_bytes(b"converted")
    is_text = path.suffix in TEXTS
    assert locate(name, tmp_path) == (path if is_text else converted)
    assert name_of(converted) == (None if is_text else name)


def test_a_cache_of_hugging_face_is_searched(tmp_path, monkeypatch):
    """A teacher's files are of several repositories, and links to blobs."""
    hub, places = tmp_path / "hub", {}
    for name in ("halton-tiny-256", "llamagen-vq16"):
        repository = hub / f"models--{OFFICIAL[name].source.replace('/', '--')}"
        for revision in ("1111", "2222", "3333"):
            blob = repository / "blobs" / f"{revision}-{name}"
            places[name] = repository / "snapshots" / revision / OFFICIAL[name].path
            for path in (blob, places[name]):
                path.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(b"weights")
            places[name].symlink_to(blob)
        places[name] = repository / "snapshots" / "2222" / OFFICIAL[name].path
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("2222")
    monkeypatch.setenv("DIMO_WEIGHTS", str(tmp_path / "mine"))
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    snapshot = places["halton-tiny-256"].parent
    for folder in (None, hub, snapshot):
        assert {name: locate(name, folder) for name in places} == places
    assert locate("halton-tiny-256", snapshot.with_name("3333")).parent.name == "3333"
    assert fetch("llamagen-vq16", None, lambda *_: None) == [places["llamagen-vq16"]]
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert locate("llamagen-vq16") == places["llamagen-vq16"]
    with pytest.raises(DimoError, match="dimo weights fetch llamagen-vq16"):
        locate("llamagen-vq16", tmp_path / "mine")


def test_no_two_files_lie_at_one_place(tmp_path):
    assert len({destination(name, tmp_path) for name in OFFICIAL}) == len(OFFICIAL)


def test_extractors_are_those_of_the_protocols():
    for name, kind in EXTRACTORS.items():
        if kind.weights and not kind.parts:
            filename, _, source = kind.weights.partition(", ")
            official = OFFICIAL[name]
            assert official.filename == filename
            assert official.source.removesuffix("/") == source.removesuffix("/").replace(
                "/releases/tag/", "/releases/download/"
            )
    for protocol in list_protocols():
        fixed = protocol.extractor
        if fixed.name in OFFICIAL and fixed.sha256 != ANY:
            assert OFFICIAL[fixed.name].sha256 == fixed.sha256


def test_a_network_without_weights_is_checked_like_one_with(golden_constructor, golden_file):
    case = "halton_transformer"
    state = read_state_dict(golden_file(f"{case}.weights.safetensors"))
    with torch.device("meta"):
        network = HaltonMaskGIT(**golden_constructor[case])
    assert check_state(network, state).keys() == state.keys()
    state["head.weight"] = state["head.weight"] + 1
    with pytest.raises(DimoError, match=r"are one tensor of HaltonMaskGIT"):
        check_state(network, state)


def test_the_average_is_taken_unless_told_otherwise_and_named(dimo, small_maskgit, tmp_path):
    ema = read_state_dict(small_maskgit / "pytorch_model.bin")
    last = {key: value + 1 for key, value in ema.items()}
    torch.save({"model": last, "ema": ema, "step": 3}, tmp_path / "x.pth")
    for options, part, state in (((), "ema", ema), (("--no-ema",), "model", last)):
        _, err = dimo("import", "x.pth", "--teacher", "maskgit", *options, "-o", part)
        assert f"imported from x.pth, its {part}" in err
        _, err = dimo("weights", "convert", "x.pth", *options, "-o", f"{part}-2")
        assert f"the {part!r} of x.pth" in err
        for file in (f"{part}/student.safetensors", f"{part}-2/x.safetensors"):
            assert state_sha256(read_state_dict(tmp_path / file)) == state_sha256(state)
