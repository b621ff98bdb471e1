"""The embedded text-to-image teacher: words, network, tokenizer; trained and distilled, tiny."""

import json
import sys

import pytest
import torch

from bench.protocol import load_protocol, protocol_text
from bench.rows.rows import jobs_of
from bench.suites.base import load_suite
from bench.suites.geneval.prompts import prompts_of
from dimo.cli import main
from dimo.config import load_recipe
from dimo.data import scenes
from dimo.data.scenes.tokenizer import SceneTokens, _disturbed, fit_tokenizer
from dimo.engine.distributed import Runtime
from dimo.engine.runs import distill, train_teacher
from dimo.errors import DimoError
from dimo.methods.dimo.recipe import DiMORecipe
from dimo.methods.pretraining import TrainRecipe
from dimo.models.scenes import SceneTokenizer, SceneTransformer, SceneWords
from dimo.models.text import Prompts, TextConditioned
from dimo.zoo.loading import load_student, load_teacher

CPU = torch.device("cpu")
PROMPTS = ["a photo of a red circle above a blue square", "a photo of three stars"]
TINY = "a photo of a ring"


class StoppedError(Exception):
    pass


def teacher_recipe(**changes):
    settings = {"steps": 4, "batch_size": 4, "tokenizer_steps": 8, "checkpoint_every": 2, **changes}
    return load_recipe(TrainRecipe, "scenes-teacher", [f"{k}={v}" for k, v in settings.items()])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of `dimo train`, barely trained."""
    folder = tmp_path_factory.mktemp("scenes") / "run"
    train_teacher(teacher_recipe(), folder, runtime=Runtime(CPU))
    return folder


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    small = SceneTransformer(hidden_dim=16, codebook_size=20, depth=2, heads=2, mlp_dim=32)
    return TextConditioned(small, Prompts(SceneWords(), [*PROMPTS, TINY])).eval()


# --- words ----------------------------------------------------------------------------------------


def test_words_that_carry_nothing_are_left_out():
    words = SceneWords()
    full = words(["a photo of a red circle left of a blue square on a dark background"])
    short = words(["Red circle left blue square dark"])
    assert full.states.shape == (1, SceneWords.length, SceneWords.width)
    assert torch.equal(full.states, short.states)
    assert not torch.equal(full.states, words(["blue circle left red square dark"]).states)
    assert words([""]).states[0, :, 0].eq(1).all()  # all padding: the null condition


def test_every_caption_is_read_and_told_from_the_others():
    words = SceneWords()
    held_out = [prompt.text for prompt in scenes.prompts("held-out")]
    states = words([*held_out]).states.argmax(-1)
    assert len(states.unique(dim=0)) == len(held_out)
    for text in scenes.captions():
        words.check(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a photo of a red circel", "did you mean 'circle'"),
        ("a photo of a red/blue circle", "unknown word .* 'red/blue'"),
        ("x" * 300, "unknown word"),
        ("red " * 75, "75 words"),
    ],
)
def test_other_texts_are_one_error(text, said):
    with pytest.raises(DimoError, match=said):
        SceneWords.check(text)


# --- network and tokenizer ------------------------------------------------------------------------


@pytest.mark.usefixtures("two_threads")
def test_an_image_has_the_same_logits_in_any_batch_and_at_positions(network):
    tokens = torch.randint(0, 21, (5, 64), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0, 1])
    with torch.inference_mode():
        logits = network(tokens, labels)
        assert logits.shape == (5, 64, 21)
        alone = network(tokens[3:4], labels[3:4])
        torch.testing.assert_close(alone[0], logits[3], atol=1e-5, rtol=1e-5)
        near, x = network.network.near[0], torch.randn(33, 72, network.hidden_dim)
        assert torch.equal(torch.cat([near(part) for part in x.split(7)]), near(x))
        places = torch.tensor([[3, 60]] * 5)
        torch.testing.assert_close(
            network(tokens, labels, positions=places), logits[:, [3, 60]], atol=1e-5, rtol=1e-5
        )


def test_the_prompt_matters_and_no_condition_is_the_empty_one(network):
    tokens = torch.full((2, 64), network.mask_token_id)
    empty = TextConditioned(network.network, Prompts(SceneWords(), [""])).eval()
    with torch.inference_mode():
        logits = network(tokens, torch.tensor([0, 1]))
        assert not torch.allclose(logits[0], logits[1])
        dropped = network(tokens, torch.tensor([0, 1]), drop=torch.tensor([True, True]))
        assert torch.equal(dropped, empty(tokens, torch.tensor([0, 0])))


def test_what_distillation_freezes_is_of_the_network(network):
    frozen = {id(parameter) for parameter in network.embedding_parameters()}
    assert frozen < {id(parameter) for parameter in network.parameters()}
    assert len(frozen) == 5


def test_the_tokenizer_goes_there_and_back_one_by_one():
    torch.manual_seed(0)
    tokenizer = SceneTokenizer(32).eval()
    images, _ = scenes.batch(0, torch.arange(6), "train")
    with torch.inference_mode():
        tokens = tokenizer.encode(images)
        assert (tokens.shape, tokens.dtype) == ((6, 64), torch.int64)
        assert torch.equal(tokens[2:4], tokenizer.encode(images[2:4]))
        again = tokenizer.decode(tokens)
        assert again.shape == images.shape
        assert torch.equal(again[5:], tokenizer.decode(tokens[5:]))


@pytest.mark.slow
def test_the_tokenizer_learns_and_is_a_function_of_its_seed():
    images, _ = scenes.batch(1, torch.arange(32), "held-out")
    target = images / 127.5 - 1
    short, again, long = (fit_tokenizer(codebook_size=64, steps=n, seed=0) for n in (4, 4, 32))
    missed = []
    for tokenizer in (short, long):
        with torch.inference_mode():
            missed.append(float((tokenizer.decode(tokenizer.encode(images)) - target).abs().mean()))
    assert missed[1] < 0.85 * missed[0]
    once = short.state_dict()
    assert all(torch.equal(once[key], value) for key, value in again.state_dict().items())


def test_a_few_of_the_tokens_that_the_decoder_learns_from_are_wrong():
    vectors = torch.arange(32 * 64.0).view(32, 1, 8, 8)  # all different
    disturbed = _disturbed(vectors, 0, 5)
    assert torch.equal(disturbed, _disturbed(vectors, 0, 5))
    changed = disturbed != vectors
    assert not torch.equal(changed, _disturbed(vectors, 0, 6) != vectors)
    shares = changed.flatten(1).float().mean(1)  # uniform rates of up to 0.2
    assert 0.07 < shares.mean() < 0.13
    assert shares.min() < 0.04
    assert shares.max() < 0.4
    assert torch.isin(disturbed, vectors).all()


def test_training_pictures_are_functions_of_seed_and_index():
    torch.manual_seed(0)
    data = SceneTokens(SceneTokenizer(32).eval())
    tokens, labels = data(7, torch.arange(8))
    some, some_labels = data(7, torch.tensor([5, 2]))
    assert torch.equal(some, tokens[[5, 2]])
    assert torch.equal(some_labels, labels[[5, 2]])
    assert not torch.equal(data(8, torch.arange(8))[1], labels)


# --- training, distillation, scoring --------------------------------------------------------------


def test_a_resumed_training_is_the_uninterrupted_one(trained, tmp_path):
    def stop(step, scalars):
        if step == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        train_teacher(teacher_recipe(), tmp_path / "run", runtime=Runtime(CPU), on_step=stop)
    fitted = []
    runtime = Runtime(CPU, progress=lambda *step: fitted.append(step))
    train_teacher(teacher_recipe(), tmp_path / "run", runtime=runtime, resume=True)
    assert not fitted  # the tokenizer was there already
    one, other = (
        load_teacher("scenes", device=CPU, weights=folder, prompts=PROMPTS).model.state_dict()
        for folder in (trained, tmp_path / "run")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_tokenizer_of_no_steps_is_refused(tmp_path):
    with pytest.raises(DimoError, match="tokenizer_steps = 0"):
        train_teacher(teacher_recipe(tokenizer_steps=0), tmp_path / "run", runtime=Runtime(CPU))


def test_it_distils_on_the_captions_of_its_world(trained, tmp_path):
    settings = ["steps=3", "batch_size=4"]
    recipe = load_recipe(DiMORecipe, "scenes", settings)
    distill(recipe, tmp_path / "run", recipe_name="scenes", runtime=Runtime(CPU), weights=trained)
    student = load_student(tmp_path / "run", device=CPU, weights=trained, prompts=PROMPTS)
    teacher = load_teacher("scenes", device=CPU, weights=trained, prompts=PROMPTS)
    assert student.condition_names == PROMPTS
    ours, theirs = student.model.state_dict(), teacher.model.state_dict()
    assert torch.equal(ours["words.weight"], theirs["words.weight"])
    assert not torch.equal(ours["head.1.weight"], theirs["head.1.weight"])


def test_a_text_file_of_other_words_is_refused_before_the_run(trained, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a photo of a red circle\na photo of a dog\n")
    recipe = load_recipe(DiMORecipe, "scenes", ["steps=3", f"prompts={file}"])
    with pytest.raises(DimoError, match="unknown word of a prompt of scenes 'dog'"):
        distill(recipe, tmp_path / "run", recipe_name="x", runtime=Runtime(CPU), weights=trained)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def protocol(tmp_path_factory):
    """`scenes-geneval` with one image a prompt."""
    shipped = load_protocol("scenes-geneval")
    path = tmp_path_factory.mktemp("protocol") / "tiny.toml"
    text = protocol_text(shipped.name)
    for old, new in (
        ('name = "scenes-geneval"', 'name = "tiny"'),
        ("num_images = 960", "num_images = 240"),
        ("images_per_prompt = 4", "images_per_prompt = 1"),
        ("n_bootstrap = 1000", "n_bootstrap = 20"),
    ):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


@pytest.mark.slow
def test_rendered_pictures_and_a_network_are_scored_alike(trained, protocol):
    fixed = load_protocol(protocol)
    asked = prompts_of(fixed.prompts, None)
    texts = [metadata["prompt"] for metadata in asked]
    loaded = load_teacher("scenes", device=CPU, weights=trained, prompts=texts)
    suite = load_suite(fixed, Runtime(CPU), batch_size=100)
    real, _, teacher = [*suite.reference_rows(loaded), *jobs_of(loaded, [1])]
    measured = suite.measure(real)
    assert measured.record.metrics["geneval"].value > 0.97
    lines = [json.loads(line) for line in measured.files[".jsonl"].splitlines()]
    assert [json.loads(line["metadata"]) for line in lines] == list(asked)
    record = suite.measure(teacher).record
    assert record.metrics["geneval"].value < 0.3  # of a network that knows nothing
    assert record.metrics["geneval_counting"].n == 40
    assert (record.seed, record.method.nfe, record.speed.batch_size) == (1000, 2, 100)
    smaller = load_suite(fixed, Runtime(CPU), batch_size=48).measure(teacher)
    assert smaller.record.evidence.images_sha256 == record.evidence.images_sha256


def cli(monkeypatch, capsys, *arguments):
    """The exit code and stderr of `dimo` in this process."""
    monkeypatch.setattr(sys, "argv", ["dimo", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().err


def test_sample_draws_prompts_and_bench_keeps_verdicts(
    trained, protocol, tmp_path, monkeypatch, capsys
):
    own = ("--weights", trained)
    prompts = ("--prompt", PROMPTS[0], "--prompt", PROMPTS[1])
    out = tmp_path / "grid.png"
    sample = ("sample", "--model", "scenes", *own, *prompts, "--steps", 1, "--out", out)
    code, _ = cli(monkeypatch, capsys, *sample)
    assert code == 0
    assert out.is_file()
    code, _ = cli(
        *(monkeypatch, capsys, "bench", "--teacher", "scenes", *own, "--protocol", protocol),
        *("--steps", 1, "--no-reference-rows", "--results", tmp_path / "results"),
    )
    assert code == 0
    (verdicts,) = (tmp_path / "results" / "verdicts").glob("*.jsonl")
    assert len(verdicts.read_text().splitlines()) == 240
    assert len(list((tmp_path / "results" / "pictures").glob("*.png"))) == 1


SAMPLE = ("sample", "--out", "x.png", "--steps", "1", "--model")
MISTAKES = {
    "no prompt": ((*SAMPLE, "scenes"), "give one or more with --prompt"),
    "labels": ((*SAMPLE, "scenes", "--labels", "1"), "--labels is for models of classes"),
    "prompt for classes": ((*SAMPLE, "digits", "--prompt", "a ring"), "digits draws classes"),
    "empty prompt": ((*SAMPLE, "scenes", "--prompt", " "), "0 characters"),
    "both": ((*SAMPLE, "scenes", "--prompt", "ring", "--prompts", "empty.txt"), "twice"),
    "empty file": ((*SAMPLE, "scenes", "--prompts", "empty.txt"), "hold no prompt"),
    "no file": ((*SAMPLE, "scenes", "--prompts", "none.txt"), "cannot read prompts"),
    "other words": ((*SAMPLE, "scenes", "--prompt", "a photo of a dog"), "unknown word"),
    "slash": ((*SAMPLE, "scenes", "--prompt", "a/b"), "unknown word"),
    "300 characters": ((*SAMPLE, "scenes", "--prompt", "red " * 75), "75 words"),
    "protocol of classes": (
        ("bench", "--teacher", "scenes", "--protocol", "digits"),
        "protocols that fit: scenes-geneval",
    ),
    "prompts not asked for": (("bench", "--prompts", "x.txt"), "--prompts x.txt is not used under"),
    "reference of one's own": (
        ("bench", "--teacher", "scenes", "--protocol", "scenes-geneval", "--reference", "x.npz"),
        "--reference x.npz is not used",
    ),
    "labels beside prompts": (
        ("eval", "images", "--protocol", "scenes-geneval", "--labels", "filename"),
        "--labels filename is not used",
    ),
    "subfolders beside prompts": (
        ("eval", "images", "--protocol", "scenes-geneval", "--recursive"),
        "--recursive is not used",
    ),
    "tuning": (
        ("bench", "--teacher", "scenes", "--protocol", "scenes-geneval", "--tune", "theta=0.5"),
        "--tune theta has no effect",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(mistake, trained, tmp_path, monkeypatch, capsys):
    arguments, words = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    own = ("--weights", trained) if "scenes" in arguments else ()
    code, told = cli(monkeypatch, capsys, *arguments, *own)
    assert code == 2
    assert told.startswith("error: ")
    assert words in told
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]
