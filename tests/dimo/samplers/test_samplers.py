"""Samplers: image i is bit-equal whatever the batch; counts and NFE are what they say."""

import itertools

import pytest
import torch

from dimo.errors import DimoError
from dimo.masking import DECODING_SCHEDULES, mask_probability
from dimo.models.maskgit import MaskGIT
from dimo.rng import ImageNoise
from dimo.samplers import SAMPLERS as ALL_SAMPLERS
from dimo.samplers import teacher_samplers
from dimo.samplers.remdm import STRATEGIES
from dimo.samplers.student import restrict_logits, sample_few_step, sample_one_step
from dimo.zoo.loading import load, load_student, load_teacher

CPU = torch.device("cpu")
SAMPLERS = {name: ALL_SAMPLERS[name] for name in teacher_samplers()}
REVEALING = ("confidence", "halton", "random")  # a fixed number of tokens at each step
LEAPING = ("tau_leaping", "theta_trapezoidal")  # at random times
GUIDED_THROUGHOUT = ("halton", "meissonic")  # others begin unguided
SETTINGS = {
    "halton": {"random_start": True, "final_temperature": 0.8},
    "remdm": {"remask": "confidence", "eta": 1.0},  # the one that remembers
}


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("digits", device=CPU)


@pytest.fixture(scope="module")
def student():
    return load_student("digits-dimo", device=CPU)


@torch.inference_mode()
def _teacher_samples(teacher, index, sampler, **settings):
    noise = ImageNoise(3, index)
    return SAMPLERS[sampler](teacher.model, index % 10, noise, **settings)


@torch.inference_mode()
def _student_samples(student, index, sampler=sample_one_step, **settings):
    config = student.student
    return sampler(
        student.model,
        index % 10,
        ImageNoise(3, index),
        init_mask_ratio=config.init_mask_ratio,
        embedding_noise=config.embedding_noise,
        **settings,
    )


def _history(calls):
    """A callback that checks the step's number and keeps the tokens."""

    def callback(step, tokens):
        assert step == len(calls)
        calls.append(tokens)

    return callback


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_teacher_images_do_not_depend_on_the_batch(teacher, sampler):
    settings = {"num_steps": 4, "guidance_scale": 2.0, **SETTINGS.get(sampler, {})}
    index = torch.arange(16)
    whole = _teacher_samples(teacher, index, sampler, **settings).tokens
    decode = teacher.tokenizer.decode
    for size in (1, 7):
        parts = [
            _teacher_samples(teacher, i, sampler, **settings).tokens for i in index.split(size)
        ]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(torch.cat([decode(part) for part in parts]), decode(whole))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("sampler", "settings"),
    [
        (sample_one_step, {"temperature": 2.0, "top_k": 20, "top_p": 0.9}),
        (sample_few_step, {"num_steps": 3}),
    ],
    ids=["one_step", "few_step"],
)
def test_student_images_do_not_depend_on_the_batch(student, sampler, settings):
    index = torch.arange(16)
    whole = _student_samples(student, index, sampler, **settings).tokens
    for size in (1, 7):
        parts = [
            _student_samples(student, i, sampler, **settings).tokens for i in index.split(size)
        ]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("sampler", REVEALING)
def test_each_step_reveals_its_count_and_keeps_what_it_revealed(teacher, sampler, steps):
    for schedule in DECODING_SCHEDULES:
        history = []
        found = _teacher_samples(
            teacher,
            torch.arange(8),
            sampler,
            num_steps=steps,
            mask_schedule=schedule,
            callback=_history(history),
        )
        revealed = torch.zeros(8, 16, dtype=torch.bool)
        for count, tokens in zip(found.token_counts, history, strict=True):
            now = tokens != teacher.model.mask_token_id
            assert torch.equal((now & ~revealed).sum(1), torch.full((8,), count))
            assert (now | ~revealed).all()
            assert torch.equal(tokens[revealed], history[-1][revealed])
            revealed = now
        assert revealed.all()
        assert int(found.tokens.max()) < teacher.model.codebook_size


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("sampler", LEAPING)
def test_a_leap_keeps_what_was_revealed_and_the_counts_are_the_expected_ones(
    teacher, sampler, steps
):
    history = []
    images = 100
    found = _teacher_samples(
        teacher, torch.arange(images), sampler, num_steps=steps, callback=_history(history)
    )
    mask = teacher.model.mask_token_id
    assert len(history) == len(found.token_counts) == steps
    for before, after in itertools.pairwise(history):
        assert torch.equal(after[before != mask], before[before != mask])
    assert torch.equal(found.tokens, history[-1])
    assert (found.tokens != mask).all()
    assert sum(found.token_counts) == 16
    left = torch.stack([(tokens == mask).double().sum(1).mean() for tokens in history])
    expected = 16 - torch.tensor(found.token_counts).cumsum(0)
    # half a token of rounding, Monte Carlo error 0.2 (one sigma); cutting reveals a little more
    assert (left - expected).abs().max() < (1.1 if sampler == "tau_leaping" else 1.5)


@pytest.mark.parametrize(
    ("remask", "schedule"),
    [(remask, "log-linear") for remask in STRATEGIES] + [("capped", "cosine"), ("loop", "arccos")],
)
def test_remdm_masks_again_and_leaves_the_masked_fraction_as_it_was(teacher, remask, schedule):
    settings = {"num_steps": 8, "remask": remask, "eta": 0.5, "mask_schedule": schedule}
    history, images = [], 200
    index = torch.arange(images)
    found = _teacher_samples(teacher, index, "remdm", callback=_history(history), **settings)
    masked = torch.stack([tokens == teacher.model.mask_token_id for tokens in history]).double()
    assert not masked[-1].any()
    assert (masked[1:] > masked[:-1]).any()  # a revealed token was masked
    left = masked.sum(2).mean(1) / 16
    if remask in ("capped", "rescaled"):
        alpha = [mask_probability(schedule)(1 - step / 8) for step in range(1, 9)]
        assert left.tolist() == pytest.approx(alpha, abs=0.03)  # 3.4 sigma
    before = torch.cat([torch.ones_like(masked[:1]), masked[:-1]])
    revealed = (before * (1 - masked)).sum(2).mean(1)
    expected = torch.tensor(found.token_counts).double()
    assert (revealed.cumsum(0) - expected.cumsum(0)).abs().max() < 1.1  # rounding, Monte Carlo
    assert sum(found.token_counts) > 16


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_at_one_step_all_samplers_are_the_same(teacher, guidance_scale):
    index = torch.arange(20)
    settings = {"num_steps": 1, "guidance_scale": guidance_scale, "temperature": 0.9}
    found = [_teacher_samples(teacher, index, sampler, **settings) for sampler in SAMPLERS]
    for samples in found:
        assert torch.equal(samples.tokens, found[0].tokens)
        assert samples.token_counts == [16]
        assert samples.nfe == (1 if guidance_scale == 1 else 2)


def test_settings_reach_the_samples(teacher):
    index = torch.arange(8)
    seen = set()
    for sampler, settings in [
        *((sampler, {}) for sampler in SAMPLERS),
        *((sampler, {"guidance_scale": 2.0}) for sampler in SAMPLERS),
        *((sampler, {"temperature": 0.7}) for sampler in SAMPLERS),
        *((sampler, {"mask_schedule": "cosine"}) for sampler in SAMPLERS),
        ("confidence", {"choice_temperature": 0.0}),
        ("halton", {"random_start": True}),
        ("halton", {"final_temperature": 0.7}),
        ("theta_trapezoidal", {"theta": 0.3}),
        *(("remdm", {"eta": 0.5, "remask": remask}) for remask in STRATEGIES),
    ]:
        tokens = _teacher_samples(teacher, index, sampler, num_steps=4, **settings).tokens
        seen.add(tuple(tokens.flatten().tolist()))
    assert len(seen) == 4 * len(SAMPLERS) + 4 + len(STRATEGIES)


@pytest.mark.parametrize(("steps", "guidance_scale"), [(1, 3.0), (4, 1.0), (5, 3.0)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nfe_counts_the_forwards(teacher, sampler, guidance_scale, steps):
    calls = []

    class Counting:
        def __getattr__(self, name):
            return getattr(teacher.model, name)

        def __call__(self, tokens, labels, **arguments):
            calls.append(len(tokens))
            return teacher.model(tokens, labels, **arguments)

    index = torch.arange(4)
    with torch.inference_mode():
        found = SAMPLERS[sampler](
            Counting(), index, ImageNoise(0, index), num_steps=steps, guidance_scale=guidance_scale
        )
    # guidance that rises from off costs nothing at the first of several steps
    free = 1 if steps > 1 and sampler not in GUIDED_THROUGHOUT else 0
    assert found.nfe == (steps if guidance_scale == 1 else 2 * steps - free)
    # without condition all images start from the same grid: one row instead of four
    shared = 3 if guidance_scale != 1 and not free else 0
    assert sum(calls) == 4 * found.nfe - shared


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_first_step_is_shared_by_the_images_of_a_label(teacher, sampler):
    """And so are the tokens, which are those of images sampled alone."""
    rows = []

    class Counting:
        def __getattr__(self, name):
            return getattr(teacher.model, name)

        def __call__(self, tokens, labels, **arguments):
            rows.append(len(tokens))
            return teacher.model(tokens, labels, **arguments)

    index, labels = torch.arange(6), torch.tensor([4, 2, 4, 4, 2, 4])
    settings = {"num_steps": 3, "guidance_scale": 2.0}
    with torch.inference_mode():
        found = SAMPLERS[sampler](Counting(), labels, ImageNoise(0, index), **settings)
        alone = [
            SAMPLERS[sampler](teacher.model, labels[i, None], ImageNoise(0, i[None]), **settings)
            for i in index
        ]
    assert rows == ([2, 1, 12, 12] if sampler in GUIDED_THROUGHOUT else [2, 12, 12])
    assert torch.equal(found.tokens, torch.cat([samples.tokens for samples in alone]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_logits_left_out_change_nothing(sampler):
    """A grid large enough that some are left out, against a network that computes them all."""
    torch.manual_seed(0)
    sizes = {"hidden_dim": 32, "codebook_size": 40, "depth": 2, "heads": 4, "nclass": 5}
    model = MaskGIT(img_size=128, mlp_dim=64, **sizes).eval()  # 64 tokens
    asked = []

    class Asked:
        takes_positions = True

        def __getattr__(self, name):
            return getattr(model, name)

        def __call__(self, tokens, labels, *, positions=None, **arguments):
            asked.append(64 if positions is None else positions.shape[1])
            return model(tokens, labels, positions=positions, **arguments)

    class Everywhere(Asked):
        takes_positions = False

    index = torch.arange(8)
    settings = {"num_steps": 6, "guidance_scale": 2.0}
    with torch.inference_mode():
        run = SAMPLERS[sampler]
        some = run(Asked(), index % 5, ImageNoise(0, index), **settings).tokens
        few, asked = asked, []
        all_ = run(Everywhere(), index % 5, ImageNoise(0, index), **settings).tokens
    assert torch.equal(some, all_)
    assert set(asked) == {64}
    assert sum(few) < (0.6 if sampler in ("random", "halton") else 0.9) * sum(asked)


def test_the_latent_of_a_mixture_is_drawn_for_each_image_and_step(teacher):
    """A model like the di4c student: its latent is new at each step and shared under guidance."""
    seen = []

    class Mixture:
        takes_latent, takes_positions = True, False

        def __getattr__(self, name):
            return getattr(teacher.model, name)

        def __call__(self, tokens, labels, *, drop=None, z):
            assert z.shape == (len(tokens),)
            seen.append(z)
            return teacher.model(tokens, labels, drop=drop)

    index = torch.arange(4)
    with torch.inference_mode():
        SAMPLERS["confidence"](
            Mixture(), index, ImageNoise(0, index), num_steps=3, guidance_scale=2.0
        )
    assert [len(z) for z in seen] == [4, 8, 8]
    assert torch.equal(seen[1][:4], seen[1][4:])
    assert len(torch.cat([z[:4] for z in seen]).unique()) == 12


@pytest.mark.parametrize(
    ("sampler", "settings", "message"),
    [
        ("confidence", {"num_steps": 0}, "takes 1 to 16 steps"),
        ("tau_leaping", {"num_steps": 0}, "steps 0 is out of range; this sampler takes 1 or more"),
        ("confidence", {"mask_schedule": "arcos"}, "did you mean 'arccos'"),
        ("tau_leaping", {"mask_schedule": "loglinear"}, "did you mean 'log-linear'"),
        ("theta_trapezoidal", {"theta": 0.0}, "theta 0 is out of range"),
        ("theta_trapezoidal", {"theta": 1.0}, "strictly between 0 and 1"),
        ("confidence", {"temperature": 0.0}, "temperature 0 is not positive"),
        ("halton", {"final_temperature": -1.0}, "temperature -1 is not positive"),
        ("confidence", {"choice_temperature": -0.5}, "choice temperature -0.5 is negative"),
        ("remdm", {"num_steps": 0}, "steps 0 is out of range"),
        ("remdm", {"mask_schedule": "linear"}, "did you mean 'log-linear'"),
        ("remdm", {"remask": "cap"}, "did you mean 'capped'"),
        ("remdm", {"eta": 1.5}, "eta 1.5 is out of range"),
        ("remdm", {"t_on": 0.5}, "t_on applies to remask=loop only, not to capped"),
        ("remdm", {"remask": "loop", "t_off": 0.6}, "t_off 0.6 and t_on 0.55 must be"),
        ("remdm", {"remask": "loop", "alpha_on": 1.0}, "alpha_on 1 is out of range"),
    ],
)
def test_wrong_settings_are_refused(teacher, sampler, settings, message):
    with pytest.raises(DimoError, match=message):
        _teacher_samples(teacher, torch.arange(2), sampler, **{"num_steps": 4, **settings})


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_out_of_range_are_refused(teacher, student, label):
    """The embedding has other rows there (the mask token, the null class) and would not object."""
    index = torch.arange(3)
    labels = torch.tensor([0, label, 9])
    noise = ImageNoise(0, index)
    message = f"label {label} is out of range; labels are 0 to 9"
    for sampler in SAMPLERS.values():
        with pytest.raises(DimoError, match=message):
            sampler(teacher.model, labels, noise, num_steps=2)
    with pytest.raises(DimoError, match=message):
        sample_one_step(student.model, labels, noise, init_mask_ratio=0.6, embedding_noise=0.1)


@pytest.mark.parametrize("name", ["digits", "digits-dimo"])
def test_logits_that_are_not_finite_are_refused(name):
    generator = load(name, device=CPU)
    parameters = generator.model.last_layer.parameters()
    torch.nn.utils.vector_to_parameters(torch.tensor([1e38]).expand(10**6), parameters)
    for settings in ({}, {"steps": 2}):
        with pytest.raises(DimoError, match="logits are not finite"):
            generator.sample(labels=[3], **settings)


def test_halton_needs_a_square_grid(teacher):
    class Line:
        num_tokens = 12

        def __getattr__(self, name):
            return getattr(teacher.model, name)

    with pytest.raises(DimoError, match="12 tokens are no square grid"):
        SAMPLERS["halton"](
            Line(), torch.zeros(1).long(), ImageNoise(0, torch.arange(1)), num_steps=2
        )


def test_one_step_sampling_uses_its_noise(student):
    """Other indices give other digits: the generator has not collapsed onto its condition."""
    tokens = _student_samples(student, torch.arange(0, 2000, 10)).tokens  # all of class 0
    assert len(torch.unique(tokens, dim=0)) > 100


def test_temperature_top_k_and_top_p_in_closed_form():
    p = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)

    def restricted(temperature=1.0, top_k=None, top_p=None):
        logits = restrict_logits(p.log(), temperature=temperature, top_k=top_k, top_p=top_p)
        return logits.softmax(-1)

    def normal(*values):
        values = torch.tensor(values, dtype=torch.float64)
        return values / values.sum()

    torch.testing.assert_close(restricted(), p)
    torch.testing.assert_close(restricted(temperature=0.5), normal(0.01, 0.16, 0.04, 0.09))
    torch.testing.assert_close(restricted(top_k=2), normal(0, 0.4, 0, 0.3))
    torch.testing.assert_close(restricted(top_k=4), p)
    torch.testing.assert_close(restricted(top_p=0.39), normal(0, 1, 0, 0))
    torch.testing.assert_close(restricted(top_p=0.41), normal(0, 0.4, 0, 0.3))
    torch.testing.assert_close(restricted(top_p=0.71), normal(0, 0.4, 0.2, 0.3))
    torch.testing.assert_close(restricted(top_p=1.0), p)
    # top-p counts what top-k left, at the temperature: 0.16 / 0.29 is above one half
    torch.testing.assert_close(restricted(temperature=0.5, top_k=3, top_p=0.5), normal(0, 1, 0, 0))
    tied = restrict_logits(torch.zeros(4), temperature=1.0, top_k=2, top_p=None)
    assert tied.tolist() == [0, 0, -torch.inf, -torch.inf]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature 0 is not positive"),
        ({"top_k": 0}, "top-k 0 is out of range; it is 1 to 256"),
        ({"top_k": 257}, "top-k 257 is out of range"),
        ({"top_p": 0.0}, "top-p 0 is out of range"),
        ({"top_p": 1.5}, "at most 1"),
    ],
)
def test_wrong_settings_of_a_student_are_refused(student, settings, message):
    with pytest.raises(DimoError, match=message):
        _student_samples(student, torch.arange(2), **settings)


def test_top_k_one_is_the_likeliest_token_whatever_the_noise(student):
    index = torch.arange(4)
    cold = _student_samples(student, index, temperature=1e-6).tokens
    assert torch.equal(_student_samples(student, index, top_k=1).tokens, cold)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_steps_write_again_what_they_mask(student, steps):
    history = []
    index = torch.arange(16)
    found = _student_samples(
        student, index, sample_few_step, num_steps=steps, callback=_history(history)
    )
    assert torch.equal(history[0], _student_samples(student, index).tokens)
    assert torch.equal(found.tokens, history[-1])
    assert found.nfe == steps == len(history) == len(found.token_counts)
    assert found.token_counts == {1: [16], 2: [16, 11], 4: [16, 13, 11, 7]}[steps]
    for before, after, count in zip(history, history[1:], found.token_counts[1:], strict=False):
        changed = (before != after).sum(1)
        assert int(changed.max()) <= count
        assert int(changed.max()) > 0


def test_few_steps_refuse_a_schedule_that_does_not_fall(student):
    for schedule in ("linear", "arccos-v1"):
        with pytest.raises(DimoError, match="unknown few-step schedule"):
            _student_samples(
                student, torch.arange(2), sample_few_step, num_steps=2, mask_schedule=schedule
            )
    with pytest.raises(DimoError, match="takes 1 to 16 steps"):
        _student_samples(student, torch.arange(2), sample_few_step, num_steps=17)
