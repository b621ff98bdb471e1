"""The taming VQGAN and the LlamaGen tokenizer against the official ones."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dimo.errors import DimoError
from dimo.models.vqgan import VQGAN, LlamaGenVQ
from dimo.weights.files import read_state_dict

VQGAN_CASE, LLAMAGEN_CASE = "taming_vqgan_f16", "halton_llamagen_vq"
FILES = [
    (VQGAN, VQGAN_CASE, "last.ckpt"),
    (VQGAN, VQGAN_CASE, "weights.safetensors"),
    (LlamaGenVQ, LLAMAGEN_CASE, "weights.safetensors"),
]
BOTH = [FILES[1], FILES[2]]


@pytest.fixture
def load(golden_file, golden_constructor):
    def build(cls, case, kind):
        return cls.from_official(golden_file(f"{case}.{kind}"), **golden_constructor[case])

    return build


@torch.inference_mode()
@pytest.mark.parametrize(("cls", "case", "kind"), FILES)
def test_codes_and_images_equal_the_official_ones(
    load, golden_arrays, assert_relative, cls, case, kind
):
    tokenizer, data = load(cls, case, kind), golden_arrays(case)
    images, float_images = data["image_u8"], data["image_u8"] / 127.5 - 1
    assert_relative(tokenizer.latents(images), data["encoder_pre_quant"])
    assert torch.equal(tokenizer.encode(images), data["encode_codes"].flatten(1))
    assert torch.equal(tokenizer.encode(float_images), data["encode_codes"].flatten(1))
    assert_relative(tokenizer.decode(data["codes"].flatten(1)), data["decode_code"])


@pytest.mark.usefixtures("two_threads")
@torch.inference_mode()
@pytest.mark.parametrize(("cls", "case", "kind"), BOTH)
def test_tokens_and_images_do_not_depend_on_the_batch(load, cls, case, kind):
    torch.manual_seed(0)
    tokenizer = load(cls, case, kind)
    tokens = torch.randint(tokenizer.codebook_size, (3, 16))
    images = tokenizer.decode(tokens)
    assert torch.equal(torch.cat([tokenizer.decode(t) for t in tokens.split(1)]), images)
    again = tokenizer.encode(images)
    assert torch.equal(torch.cat([tokenizer.encode(i) for i in images.split(1)]), again)
    wide = tokenizer.decode(torch.randint(tokenizer.codebook_size, (1, 25)))
    assert wide.shape == (1, 3, 80, 80)  # fully convolutional: other sizes than the nominal


@pytest.mark.parametrize(("side", "sizes"), [(16, [8, 8, 4]), (32, [2] * 10)])
def test_an_accelerator_decodes_a_bounded_number_of_pixels_at_once(side, sizes):
    with torch.device("meta"):  # any device but a CPU takes the same path
        tokenizer, tokens = VQGAN(), torch.zeros(20, side * side, dtype=torch.int64)
    seen = []
    tokenizer.decoder.register_forward_hook(lambda _, arguments, __: seen.append(len(arguments[0])))
    assert tokenizer.decode(tokens).shape == (20, 3, 16 * side, 16 * side)
    assert seen == sizes


@pytest.mark.parametrize("tokens", [0, 15])
def test_no_square_grid_is_refused(load, tokens):
    with pytest.raises(DimoError, match="no square grid"):
        load(*BOTH[0]).decode(torch.zeros(1, tokens, dtype=torch.int64))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 40, 64, dtype=torch.uint8),
        torch.zeros(1, 1, 64, 64, dtype=torch.uint8),
        torch.zeros(3, 64, 64, dtype=torch.uint8),
        torch.zeros(1, 3, 64, 64, dtype=torch.int64),
    ],
)
def test_other_than_images_are_refused(load, images):
    with pytest.raises(DimoError, match="cannot encode"):
        load(*BOTH[0]).encode(images)


def test_the_whole_yaml_configuration_is_taken(golden, golden_file):
    config = json.loads((golden / f"{VQGAN_CASE}.config.json").read_text())
    tokenizer = VQGAN.from_official(golden_file(f"{VQGAN_CASE}.last.ckpt"), **config)
    assert (tokenizer.num_tokens, tokenizer.codebook_size, tokenizer.factor) == (16, 20, 16)
    params = config["model"]["params"]
    del params["lossconfig"]
    assert VQGAN(**params, image_size=128).num_tokens == 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_embeds": 20}, "unknown key 'n_embeds'; did you mean 'n_embed'"),
        ({"ddconfig": {"ch_mult": [1, "2"]}}, r"ddconfig\.ch_mult\[1\]"),
        ({"ddconfig": {"double_z": True}}, "double_z must be false"),
        ({"ddconfig": {"ch": 40}}, "multiple of 32"),
    ],
)
def test_a_wrong_configuration_is_named(change, words):
    with torch.device("meta"), pytest.raises(DimoError, match=words):
        VQGAN(**change)


def test_the_default_configuration_does_not_fit_a_small_file(golden_file):
    with pytest.raises(DimoError, match="file and configuration belong together"):
        VQGAN.from_official(golden_file(f"{VQGAN_CASE}.last.ckpt"))


def test_the_training_parts_of_a_checkpoint_are_left_out(golden_file, golden_constructor, tmp_path):
    state = read_state_dict(golden_file(f"{VQGAN_CASE}.last.ckpt"))
    state["loss.discriminator.main.0.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "with_loss.safetensors")
    VQGAN.from_official(tmp_path / "with_loss.safetensors", **golden_constructor[VQGAN_CASE])
    state["head.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "foreign.safetensors")
    with pytest.raises(DimoError, match=r"1 unexpected \(head.weight\)"):
        VQGAN.from_official(tmp_path / "foreign.safetensors", **golden_constructor[VQGAN_CASE])


def test_llamagen_takes_the_official_file_and_arguments(golden_file, golden_constructor, tmp_path):
    state = read_state_dict(golden_file(f"{LLAMAGEN_CASE}.weights.safetensors"))
    torch.save({"model": state}, tmp_path / "vq_ds16_c2i.pt")
    config = {**golden_constructor[LLAMAGEN_CASE], "codebook_l2_norm": True, "dropout_p": 0.0}
    tokenizer = LlamaGenVQ.from_official(tmp_path / "vq_ds16_c2i.pt", **config)
    assert tokenizer.state_dict().keys() == state.keys()
    with pytest.raises(DimoError, match="codebook_l2_norm false"):
        LlamaGenVQ.from_official(tmp_path / "vq_ds16_c2i.pt", codebook_l2_norm=False)


def level(prefix, blocks, inputs, outputs, count):
    """Names and shapes of the residual blocks of one level."""
    shapes = {}
    for i in range(count):
        name, first = f"{prefix}.{blocks}.{i}", inputs if i == 0 else outputs
        shapes[f"{name}.norm1.weight"] = (first,)
        shapes[f"{name}.conv1.weight"] = (outputs, first, 3, 3)
        shapes[f"{name}.norm2.weight"] = (outputs,)
        shapes[f"{name}.conv2.weight"] = (outputs, outputs, 3, 3)
        if first != outputs:
            shapes[f"{name}.nin_shortcut.weight"] = (outputs, first, 1, 1)
    return shapes


def attention(name, width):
    convolutions = {f"{name}.{k}.weight": (width, width, 1, 1) for k in ("q", "k", "v", "proj_out")}
    return {f"{name}.norm.weight": (width,), **convolutions}


def expected_shapes(names, codebook, code_dim):
    """All weights of the full-size network, written out from the facts; biases follow."""
    down, up, up_order, blocks, (first, second, third) = names
    widths = [128, 128, 256, 256, 512]
    shapes = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.norm_out.weight": (512,),
        "encoder.conv_out.weight": (256, 512, 3, 3),
        "decoder.conv_in.weight": (512, 256, 3, 3),
        "decoder.norm_out.weight": (128,),
        "decoder.conv_out.weight": (3, 128, 3, 3),
        "quant_conv.weight": (code_dim, 256, 1, 1),
        "post_quant_conv.weight": (256, code_dim, 1, 1),
    }
    for part in ("encoder", "decoder"):
        for middle in (first, third):
            inner = level(f"{part}.mid", "x", 512, 512, 1)
            shapes |= {k.replace("mid.x.0", f"mid.{middle}"): v for k, v in inner.items()}
        shapes |= attention(f"{part}.mid.{second}", 512)
    for i, width in enumerate(widths):
        prefix = f"encoder.{down}.{i}"
        shapes |= level(prefix, blocks, widths[max(i - 1, 0)], width, 2)
        if i < 4:
            shapes[f"{prefix}.downsample.conv.weight"] = (width, width, 3, 3)
        prefix = f"decoder.{up}.{up_order(i)}"
        shapes |= level(prefix, blocks, widths[min(i + 1, 4)], width, 3)
        if i > 0:
            shapes[f"{prefix}.upsample.conv.weight"] = (width, width, 3, 3)
    for i in range(2):
        shapes |= attention(f"encoder.{down}.4.attn.{i}", 512)
    for i in range(3):
        shapes |= attention(f"decoder.{up}.{up_order(4)}.attn.{i}", 512)
    biases = {k.replace("weight", "bias"): v[:1] for k, v in shapes.items()}
    return {**shapes, **biases, "quantize.embedding.weight": (codebook, code_dim)}


@pytest.mark.parametrize(
    ("cls", "names", "codebook", "extra", "millions"),
    [
        (
            VQGAN,
            ("down", "up", lambda i: i, "block", ("block_1", "attn_1", "block_2")),
            (1024, 256),
            {},
            72.142,
        ),
        (
            LlamaGenVQ,
            ("conv_blocks", "conv_blocks", lambda i: 4 - i, "res", ("0", "1", "2")),
            (16384, 8),
            {"quantize.codebook_used": (65536,)},
            71.883,
        ),
    ],
)
def test_full_size_has_the_official_names_and_shapes(cls, names, codebook, extra, millions):
    with torch.device("meta"):
        tokenizer = cls()
    shapes = {key: tuple(value.shape) for key, value in tokenizer.state_dict().items()}
    assert shapes == {**expected_shapes(names, *codebook), **extra}
    assert round(sum(p.numel() for p in tokenizer.parameters()) / 1e6, 3) == millions
    assert tokenizer.num_tokens == 256
