"""A tiny Meissonic in the official folder layout: loaded, sampled, distilled; what is refused."""

import dataclasses
import json
import re
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.monitor import Watching, watching
from bench.rows.settings import Choice, settings_of, teacher_settings
from dimo.config import load_recipe
from dimo.engine.distributed import Runtime
from dimo.engine.runs import distill
from dimo.errors import DimoError
from dimo.methods.dimo.recipe import DiMORecipe
from dimo.models.meissonic import Meissonic
from dimo.models.snapshot import CLIPText, DiffusersVQ
from dimo.rng import ImageNoise
from dimo.samplers import SAMPLERS
from dimo.samplers.ordered import halton_order
from dimo.samplers.student import sample_one_step
from dimo.zoo.loading import load_student, load_teacher, make_network
from dimo.zoo.teachers import TEACHERS

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a photo of a cat"]
NETWORK = {
    "input_size": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (2, 2, 4),
    "vocab_size": 22,
    "codebook_size": 20,
}
VQ = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "num_vq_embeddings": 20,
    "lookup_from_codebook": True,
}


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory):
    """An official folder, written by the libraries that write the real one."""
    from diffusers import VQModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    folder = tmp_path_factory.mktemp("snapshot")
    torch.manual_seed(0)
    network = Meissonic(**NETWORK)
    (folder / "transformer").mkdir()
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(network.state_dict(), weights)
    config = {k: v for k, v in NETWORK.items() if k != "input_size"}
    config |= {"_class_name": "Transformer2DModel", "patch_size": 1, "in_channels": 64}
    config |= {"downsample": True, "upsample": True, "guidance_embeds": False}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    VQModel(**VQ).save_pretrained(folder / "vqvae")
    characters = "abcdefghijklmnopqrstuvwxyz,."
    words = [
        *characters,
        *(f"{c}</w>" for c in characters),
        "ab",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (folder / "tokenizer").mkdir()
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer_config = {"tokenizer_class": CLIPTokenizer.__name__, "model_max_length": 77}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    CLIPTextModelWithProjection(text).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture
def row(monkeypatch):
    """The row `meissonic` at the size of the snapshot."""
    full = TEACHERS["meissonic"]
    text = dataclasses.replace(full.text, states_dim=24, pooled_dim=16)
    row = dataclasses.replace(
        full,
        network=NETWORK,
        tokenizer=partial(DiffusersVQ.from_official, image_size=16),
        image_size=16,
        num_tokens=64,
        text=text,
    )
    monkeypatch.setitem(TEACHERS, "meissonic", row)
    return row


def test_the_text_encoder_reads_what_meissonic_reads(snapshot):
    """All 77 tokens, the states of the last layer but one, the projected vector."""
    from transformers import CLIPTextModelWithProjection

    encoder = CLIPText.from_official(snapshot / "text_encoder" / "model.safetensors")
    with torch.inference_mode():
        found = encoder([*PROMPTS, "", "word " * 100])
    assert found.states.shape == (5, 77, 24)
    assert found.pooled.shape == (5, 16)
    model = CLIPTextModelWithProjection.from_pretrained(snapshot / "text_encoder").eval()
    words = json.loads((snapshot / "tokenizer" / "vocab.json").read_text())
    end = words["<|endoftext|>"]
    ids = [words["<|startoftext|>"], words["a</w>"], *(words[c] for c in ("r", "e", "d</w>"))]
    ids += [*(words[c] for c in (*"circl", "e</w>")), end]
    with torch.inference_mode():
        padded = torch.tensor([ids + [end] * (77 - len(ids))])
        out = model(padded, output_hidden_states=True)
    torch.testing.assert_close(found.states[0], out.hidden_states[1][0])
    torch.testing.assert_close(found.pooled[0], out.text_embeds[0])
    assert not torch.equal(out.hidden_states[1], out.hidden_states[2])


def test_the_tokenizer_goes_there_and_back(snapshot):
    from diffusers import VQModel

    path = snapshot / "vqvae" / "diffusion_pytorch_model.safetensors"
    tokenizer = DiffusersVQ.from_official(path, image_size=16)
    assert (tokenizer.codebook_size, tokenizer.num_tokens) == (20, 64)
    torch.manual_seed(0)
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    tokens = tokenizer.encode(images)
    assert (tokens.shape, tokens.dtype) == ((3, 64), torch.int64)
    network = VQModel.from_pretrained(snapshot / "vqvae").eval()
    with torch.inference_mode():
        latents = network.encode(images.float() / 255).latents
        assert torch.equal(network.quantize(latents)[2][2].view(3, 64), tokens)
        official = network.decode(tokens, force_not_quantize=True, shape=(3, 8, 8, 4)).sample
    expected = official.clamp(0, 1) * 2 - 1
    torch.testing.assert_close(tokenizer.decode(tokens), expected, atol=1e-5, rtol=0)
    assert torch.equal(tokenizer.decode(tokens[:1]), tokenizer.decode(tokens)[:1])
    with pytest.raises(DimoError, match=r"allowed: uint8 \[B, 3, 16, 16\]"):
        tokenizer.encode(images[..., :8])


def test_the_teacher_draws_prompts(snapshot, row):
    loaded = load_teacher("meissonic", device=CPU, weights=snapshot, prompts=PROMPTS)
    noise, labels = ImageNoise(0, torch.arange(3)), torch.tensor([0, 1, 2])
    own = row.defaults
    assert own.choice_temperature == settings_of(own.sampler)["choice_temperature"] == 2.0
    assert own.mask_schedule == settings_of(own.sampler)["mask_schedule"]
    with torch.inference_mode():
        found = SAMPLERS[own.sampler](
            loaded.model, labels, noise, num_steps=4, guidance_scale=own.guidance_scale
        )
        images = loaded.tokenizer.decode(found.tokens)
        one = SAMPLERS[own.sampler](
            loaded.model,
            labels[1:2],
            ImageNoise(0, torch.arange(1, 2)),
            num_steps=4,
            guidance_scale=own.guidance_scale,
        )
        off = SAMPLERS[own.sampler](loaded.model, labels, noise, num_steps=4)
    assert found.nfe == 8  # guided at every step, the first too
    assert found.token_counts == [5, 14, 21, 24]
    assert images.shape == (3, 3, 16, 16)
    assert torch.equal(one.tokens, found.tokens[1:2])  # the same in any batch
    assert not torch.equal(off.tokens, found.tokens)
    assert loaded.model.conditions.negative_prompt.startswith("worst quality")


def test_the_teacher_draws_in_halton_order(snapshot, row):
    (settings,) = teacher_settings(row, [4], Choice(("halton",)))
    assert (settings.guidance_scale, settings.mask_schedule) == (9.0, "arccos-halton")
    loaded = load_teacher("meissonic", device=CPU, weights=snapshot, prompts=PROMPTS)
    history = []
    with torch.inference_mode():
        found = SAMPLERS["halton"](
            loaded.model,
            torch.arange(3),
            ImageNoise(0, torch.arange(3)),
            num_steps=4,
            guidance_scale=settings.guidance_scale,
            callback=lambda step, tokens: history.append(tokens),
        )
    assert (found.nfe, sum(found.token_counts)) == (8, 64)
    order, done = halton_order(8), 0  # of a grid of 8 x 8
    for count, tokens in zip(found.token_counts, history, strict=True):
        done += count
        revealed = (tokens != loaded.model.mask_token_id).nonzero()[:, 1].view(3, done)
        assert torch.equal(revealed, order[:done].sort().values.expand(3, -1))


def test_a_tiny_meissonic_distils_and_samples(snapshot, row, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    recipe = load_recipe(
        DiMORecipe,
        "meissonic",
        [
            "steps=20",
            "batch_size=4",
            "accumulate=2",
            "lr_warmup_steps=2",
            "learning_rate=1e-3",
            "auxiliary_learning_rate=1e-3",
            f'prompts="{tmp_path / "prompts.txt"}"',
        ],
    )
    assert recipe.gradient_checkpointing
    steps = []
    run = tmp_path / "run"
    with watching(Watching(10), recipe, run, device=CPU, weights=snapshot) as watchers:
        config = distill(
            recipe,
            run,
            recipe_name="meissonic",
            runtime=Runtime(CPU),
            weights=snapshot,
            on_step=lambda step, values: steps.append(step),
            watchers=watchers,
        )
    assert steps[-1] == 20
    assert (config.init_mask_ratio, config.embedding_noise) == (0.5, 0.3)
    assert not list(tmp_path.glob("**/*.tmp"))
    pictures = sorted(path.name for path in (run / "samples").iterdir())
    assert pictures == [f"step-00000{step}.png" for step in ("00", "10", "20")]
    before = load_file(snapshot / "transformer" / "diffusion_pytorch_model.safetensors")
    after = load_file(run / "student.safetensors")  # under the official names
    assert after.keys() == before.keys()
    still = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert still == {name for name in before if name.startswith(("embed.", "mlm_layer."))}

    student = load_student(run, device=CPU, weights=snapshot, prompts=["another prompt", "a cat"])
    with torch.inference_mode():
        found = sample_one_step(
            student.model,
            torch.tensor([0, 1]),
            ImageNoise(0, torch.arange(2)),
            init_mask_ratio=config.init_mask_ratio,
            embedding_noise=config.embedding_noise,
        )
    assert found.tokens.shape == (2, 64)
    assert student.tokenizer.decode(found.tokens).shape == (2, 3, 16, 16)


def test_prompts_that_do_not_belong_are_one_error(snapshot, row):
    with pytest.raises(DimoError, match="'meissonic' draws prompts; give them"):
        load_teacher("meissonic", device=CPU, weights=snapshot)
    with pytest.raises(DimoError, match="'digits' draws classes, not prompts"):
        load_teacher("digits", device=CPU, prompts=PROMPTS)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", "weights fetch meissonic"),
        ("vqvae/diffusion_pytorch_model.safetensors", "weights fetch meissonic-vq"),
        ("vqvae/config.json", "vqvae/config.json: No such file"),
        ("text_encoder/model.safetensors", "weights fetch meissonic-text"),
        ("text_encoder/config.json", "no config.json in .*text_encoder"),
        ("tokenizer/vocab.json", "no vocab.json in .*tokenizer"),
        ("tokenizer/merges.txt", "no merges.txt in .*tokenizer"),
    ],
)
def test_a_missing_file_is_named(snapshot, row, tmp_path, missing, said):
    for path in snapshot.rglob("*.*"):
        name = path.relative_to(snapshot)
        if str(name) != missing and path.is_file():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).symlink_to(path)
    with pytest.raises(DimoError, match=said):
        load_teacher("meissonic", device=CPU, weights=tmp_path, prompts=PROMPTS)


def test_damaged_and_foreign_parts_are_one_error(snapshot, tmp_path):
    for part in ("text_encoder", "tokenizer", "vqvae"):
        (tmp_path / part).mkdir()
        for path in (snapshot / part).iterdir():
            (tmp_path / part / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    save_file({**state, "extra.weight": torch.zeros(1)}, weights, {"format": "pt"})
    with pytest.raises(DimoError, match=r"1 unexpected_keys \(extra.weight\)"):
        CLIPText.from_official(weights)
    del state["text_projection.weight"]
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(DimoError, match=r"1 missing_keys \(text_projection.weight\)"):
        CLIPText.from_official(weights)
    weights.write_bytes(b"no weights")
    with pytest.raises(DimoError, match="cannot read text encoder"):
        CLIPText.from_official(weights)

    vq = tmp_path / "vqvae" / "diffusion_pytorch_model.safetensors"
    config = vq.with_name("config.json")
    content = json.loads(config.read_text())
    for changes, said in (
        ({"layers_per_block": 2}, r"keys .* missing"),
        ({"levels": 2}, r"no configuration of a VQModel: .*levels"),
        ({"_class_name": "AutoencoderKL"}, "_class_name is not 'VQModel'"),
    ):
        config.write_text(json.dumps({**content, **changes}))
        with pytest.raises(DimoError, match=said):
            DiffusersVQ.from_official(vq, image_size=16)


@pytest.mark.parametrize(
    ("package", "cls"), [("transformers", CLIPText), ("diffusers", DiffusersVQ)]
)
def test_without_the_extra_the_error_says_so(package, cls, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    said = f"needs the package {package}; install it with: pip install 'dimo[t2i]'"
    with pytest.raises(DimoError, match=re.escape(said)):
        cls.from_official("x/y.safetensors")


def test_the_row_has_the_size_of_the_published_network():
    row = TEACHERS["meissonic"]
    with torch.device("meta"):
        model = make_network(row)
    assert (model.num_tokens, model.depth, model.num_classes) == (4096, 42, 1)
    assert sum(p.numel() for p in model.parameters()) == 1_006_946_304
