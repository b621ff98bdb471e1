"""What several tests share."""

import dataclasses
import gzip
import io
import json
import os
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch_fidelity import FeatureExtractorInceptionV3

from bench.protocol import protocol_text
from dimo.cli import main
from dimo.models.vqgan import VQGAN
from dimo.zoo.teachers import TEACHERS

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items):
    """Tests of commands come first, being the longest: the processes of a run then end together."""
    items.sort(key=lambda item: item.path.parent != GOLDEN.parent)


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_session(tmp_path_factory):
    """No test reads or fills the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIMO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def two_threads():
    """As most users compute; `make test` runs a process a core with one thread each.

    It also sets OMP_WAIT_POLICY=PASSIVE, without which these tests take twenty times as long there.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# Imports what the commands import, which takes most of their time, and never computes.
_FORKS = """
import gc, json, os, runpy, sys, traceback
import accelerate, scipy.stats, sklearn.datasets, tensorboard.compat, torch._dynamo, torchvision
import bench.rows.rows, bench.suites.features, dimo.cli, dimo.engine.runs

def wait_to_be_forked():
    for line in sys.stdin:
        request, children = json.loads(line), []
        for environ in request["environs"]:
            children.append(os.fork())
            if children[-1] == 0:
                return request, environ
        ends = [os.waitpid(child, 0)[1] for child in children]
        print(json.dumps([os.waitstatus_to_exitcode(end) for end in ends]), flush=True)
    os._exit(0)

gc.freeze()  # a fork's collections would copy all that was imported
request, environ = wait_to_be_forked()
os.environ.clear()
os.environ.update(environ)
os.chdir(request["cwd"])
for number, name in enumerate((os.devnull, *request["outputs"])):
    os.dup2(os.open(name, os.O_RDWR | os.O_APPEND), number)
sys.argv, code = request["argv"], 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    code = stop.code or 0
except BaseException:
    traceback.print_exc()
    code = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # taking all that was imported down again takes seconds
"""


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """`forks(argv, cwd, environs)`: a process of a script for each environment.

    They are forks of one that has imported the libraries. Returns their exit codes and what they
    wrote to stdout and stderr.
    """
    outputs = [tmp_path_factory.mktemp("output") / name for name in ("stdout", "stderr")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", _FORKS], **pipes) as server:

        def call(argv, cwd, environs):
            for path in outputs:
                path.write_bytes(b"")
            request = {"argv": list(map(str, argv)), "cwd": str(cwd), "environs": environs}
            request["outputs"] = list(map(str, outputs))
            print(json.dumps(request), file=server.stdin, flush=True)
            codes = json.loads(server.stdout.readline())
            return codes, *(path.read_text() for path in outputs)

        yield call
        server.stdin.close()


@pytest.fixture(scope="session")
def run():
    """`run("report", ..., cwd=folder, code=0)`: a command, run in this process to its end."""

    def call(*arguments, cwd, code=0):
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(sys, "argv", ["dimo", *map(str, arguments)])
            with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
                main()
        found = stop.value.code or 0
        assert found == code, err.getvalue()
        return subprocess.CompletedProcess(arguments, found, out.getvalue(), err.getvalue())

    return call


@pytest.fixture
def dimo(run, tmp_path, monkeypatch):
    """`dimo("report", ..., code=0)` in `tmp_path` -> (stdout, stderr), the latter on one line."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, code=0):
        done = run(*arguments, cwd=tmp_path, code=code)
        return done.stdout, " ".join(done.stderr.split())

    return call


@pytest.fixture(scope="session")
def two_ranks(forks):
    """`two_ranks(argv, cwd)`: exit codes, stdout and stderr of a script on two ranks.

    The environment is the one that torchrun makes, without the seconds that torchrun takes.
    """

    def call(argv, cwd):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared |= {"TORCHELASTIC_RUN_ID": "test"}
        environs = [{**os.environ, **shared, "RANK": r, "LOCAL_RANK": r} for r in ("0", "1")]
        return forks(argv, cwd, environs)

    return call


@pytest.fixture(scope="session")
def run_two_ranks(two_ranks):
    """As `run`, but on two ranks, which must both end with the `code`."""
    dimo = Path(sys.executable).with_name("dimo")

    def call(*arguments, cwd, code=0):
        codes, out, err = two_ranks([dimo, *arguments], cwd)
        assert codes == [code, code], err
        return subprocess.CompletedProcess(arguments, code, out, err)

    return call


@pytest.fixture
def run_ranks(two_ranks, tmp_path):
    """`run_ranks(program)`: what two ranks of a program write to stdout."""

    def call(program, cwd=tmp_path):
        script = tmp_path / "script.py"
        script.write_text(program)
        codes, out, err = two_ranks([script], cwd)
        assert codes == [0, 0], err
        return out

    return call


# a command that gets a signal once a file is there, wherever the command is by then
_STOPPED = """
import os, signal, sys, threading, time
from pathlib import Path
from dimo.cli import main

def stop():
    while not list(Path().glob({file!r})):
        time.sleep(0.001)
    os.kill(os.getpid(), {how})

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
threading.Thread(target=stop, daemon=True).start()
sys.argv = ["dimo", *{arguments!r}]
main()
"""


@pytest.fixture
def run_stopped(forks, tmp_path_factory):
    """`run_stopped(*arguments, cwd=folder, file="*.part", how=SIGINT)` -> (exit code, stderr)."""

    def call(*arguments, cwd, file, how):
        script = tmp_path_factory.mktemp("stopped") / "script.py"
        arguments = list(map(str, arguments))
        script.write_text(_STOPPED.format(file=file, how=int(how), arguments=arguments))
        ((code,), _, err) = forks([script], cwd, [dict(os.environ)])
        return code, err

    return call


@pytest.fixture(scope="session")
def write_prompts():
    """`write_prompts(folder, prompts)`: GenEval's layout without images."""

    def write(folder, prompts):
        for number, metadata in enumerate(prompts):
            (folder / f"{number:05d}").mkdir(parents=True)
            (folder / f"{number:05d}" / "metadata.jsonl").write_text(json.dumps(metadata))

    return write


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory):
    """The protocol `digits` as a file, called `few`: 300 images, 100 to choose by, 20 resamples."""
    text = protocol_text("digits")
    for old, new in (
        ('name = "digits"', 'name = "few"'),
        ("num_images = 5000", "num_images = 300"),
        ("n_select = 2000", "n_select = 100"),
        ("n_bootstrap = 200", "n_bootstrap = 20"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = tmp_path_factory.mktemp("protocol") / "few.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def golden():
    """Folder of the golden files."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_arrays():
    """Reads the arrays of a golden case as tensors; integers become int64."""

    def read(case: str) -> dict[str, torch.Tensor]:
        with np.load(GOLDEN / f"{case}.data.npz") as data:
            arrays = {key: torch.from_numpy(data[key]) for key in data.files}
        return {k: v.long() if v.dtype == torch.int32 else v for k, v in arrays.items()}

    return read


@pytest.fixture(scope="session")
def tiny_network():
    """Constructor arguments of the golden networks."""
    return {
        "img_size": 64,
        "hidden_dim": 32,
        "codebook_size": 20,
        "depth": 2,
        "heads": 4,
        "mlp_dim": 64,
        "dropout": 0.0,
        "nclass": 5,
    }


class _Untrained(FeatureExtractorInceptionV3):
    """torch-fidelity's network as it is made, before any weights are loaded."""

    def load_state_dict(self, state_dict):
        assert not state_dict


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A state dict in a file: He's initialisation, batch normalisations that do something."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = _Untrained("random", ["2048"], folder / "empty.pth")
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
        if isinstance(part, nn.BatchNorm2d):
            for values in (part.weight, part.running_var):
                nn.init.uniform_(values, 0.8, 1.2)
            for values in (part.bias, part.running_mean):
                nn.init.normal_(values, std=0.1)
    path = folder / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def _image(number, height, width):
    """uint8 [3, H, W]: a gradient with its own direction and colours, and noise."""
    rng = np.random.RandomState(number)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    slopes = rng.uniform(-1, 1, (2, 3, 1, 1))
    levels = 128 + 120 * (slopes[0] * x + slopes[1] * y) + rng.normal(0, 30, (3, height, width))
    return np.clip(levels, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def make_images():
    """`make_images(count, height, width)` -> uint8 [count, 3, H, W]."""

    def make(count, height, width):
        return torch.from_numpy(np.stack([_image(i, height, width) for i in range(count)]))

    return make


@pytest.fixture(scope="session")
def golden_file(tmp_path_factory):
    """Path of a golden file; a compressed one is unpacked first."""
    folder = tmp_path_factory.mktemp("golden")

    def unpack(name: str) -> Path:
        if (GOLDEN / name).exists():
            return GOLDEN / name
        path = folder / name
        path.write_bytes(gzip.decompress((GOLDEN / f"{name}.gz").read_bytes()))
        return path

    return unpack


@pytest.fixture
def small_maskgit(golden, golden_file, tiny_network, tmp_path, monkeypatch):
    """A folder of official layouts in small; the row `maskgit` is made as small as they are."""
    small = dataclasses.replace(
        TEACHERS["maskgit"],
        network=tiny_network,
        tokenizer=VQGAN.from_file,
        image_size=64,
        num_tokens=16,
        num_classes=5,
        names=lambda: tuple("abcde"),
    )
    monkeypatch.setitem(TEACHERS, "maskgit", small)
    sources = {
        "MaskGIT_ImageNet_256.pth": golden / "maskgit_v1_transformer.official.pth",
        "pytorch_model.bin": golden / "maskgit_v1_transformer.dimo_pytorch_model.bin",
        "last.ckpt": golden_file("taming_vqgan_f16.last.ckpt"),
        "model.yaml": golden / "taming_vqgan_f16.config.json",  # JSON is YAML
    }
    folder = tmp_path / "weights"
    folder.mkdir()
    for name, source in sources.items():
        (folder / name).write_bytes(source.read_bytes())
    return folder


@pytest.fixture(scope="session")
def golden_constructor():
    """Constructor arguments of a golden case, as its manifest has them."""
    cases = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
    return {case["case"]: case["constructor"] for case in cases}


@pytest.fixture(scope="session")
def assert_relative():
    """Asserts equality to 1e-5 of the largest expected value."""

    def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
        atol = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)

    return check
