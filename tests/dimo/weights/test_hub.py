"""Students on Hugging Face: exported, pushed to a stand-in of its HTTP interface, and loaded."""

import base64
import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import dimo as package
from bench.records.store import load_all
from bench.report import read_report
from bench.rows.rows import parse_candidate, plan_models
from dimo.errors import DimoError
from dimo.weights.catalog import ASSETS
from dimo.weights.download import push
from dimo.zoo.students import find_student

# of httpx2 about huggingface_hub, which uploads large files so
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

RESULTS = Path(__file__).parents[3] / "results"
SHIPPED = ASSETS / "digits-dimo" / "student.safetensors"
SHA256 = hashlib.sha256(SHIPPED.read_bytes()).hexdigest()
TOKEN = "hf_of_somebody"
FILES = {"student.safetensors", "student.safetensors.sha256", "config.json", "recipe.toml"}


class Hub(ThreadingHTTPServer):
    """Repositories as lists of commits, each {path: content}; safetensors go through LFS."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.large, self.refused, self.log = {}, {}, {}, []

    def commits(self, name):
        return self.repositories.setdefault(name, [("0" * 40, {".gitattributes": b""})])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        """As that of the base class, with one method for all kinds of requests."""
        self.raw_requestline = self.rfile.readline(65537)
        self.close_connection = not (self.raw_requestline and self.parse_request())
        if not self.close_connection:
            self.answer()

    def answer(self):
        hub, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.log.append((self.command, path))
        for pattern, status in hub.refused.items():
            if re.search(pattern, path):
                return self.reply({"error": "refused"}, status)
        is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command == "POST" and "yaml" not in path and not is_known:
            return self.reply({"error": "Invalid username or password."}, 401)
        for pattern, method in ROUTES.items():
            if found := re.fullmatch(pattern, path):
                return method(self, *found.groups(), body)
        return self.reply({"error": "no such page"}, 404)

    def reply(self, content, status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": len(data), "Content-Type": "application/json"} | headers
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def create(self, body):
        given = json.loads(body)
        name = f"{given['organization']}/{given['name']}"
        status = 409 if name in self.server.repositories else 200
        self.server.commits(name)
        self.reply({"url": f"{self.server.url}/{name}"}, status)

    def yaml(self, body):
        self.reply({"warnings": [], "errors": []})

    def commit_of(self, name, revision):
        """A commit and its files; None after it was said that there is none."""
        commits = dict(self.server.repositories.get(name, ()))
        if not commits:
            return self.reply({}, 401, X_Error_Code="RepoNotFound")
        revision = list(commits)[-1] if revision in (None, "main") else revision
        if revision not in commits:
            return self.reply({}, 404, X_Error_Code="RevisionNotFound")
        return revision, commits[revision]

    def info(self, name, revision, body):
        if found := self.commit_of(name, revision):
            files = [{"rfilename": path} for path in found[1]]
            self.reply({"id": name, "sha": found[0], "siblings": files})

    def tree(self, name, revision, body):
        if found := self.commit_of(name, revision):
            rows = [
                {"type": "file", "path": path, "size": len(content), "oid": "a" * 40}
                for path, content in found[1].items()
            ]
            self.reply(rows)

    def file(self, name, revision, path, body):
        if found := self.commit_of(name, revision):
            etag = hashlib.sha256(found[1][path]).hexdigest()
            self.reply(found[1][path], ETag=f'"{etag}"', X_Repo_Commit=found[0])

    def preupload(self, name, body):
        files = [
            {"path": f["path"], "shouldIgnore": False, "uploadMode": mode}
            for f in json.loads(body)["files"]
            for mode in ["lfs" if f["path"].endswith(".safetensors") else "regular"]
        ]
        self.reply({"files": files})

    def batch(self, name, body):
        objects = [
            {**given, "actions": {"upload": {"href": f"{self.server.url}/upload/{given['oid']}"}}}
            for given in json.loads(body)["objects"]
        ]
        self.reply({"transfer": "basic", "objects": objects})

    def upload(self, oid, body):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large[oid] = body
        self.reply({})

    def commit(self, name, body):
        lines = [json.loads(line) for line in body.splitlines()]
        commits, header = self.server.commits(name), lines[0]["value"]
        if header["parentCommit"] != commits[-1][0]:
            self.reply({"error": "the branch moved"}, 412)
            return
        files = dict(commits[-1][1])
        for value in (line["value"] for line in lines[1:]):
            content = self.server.large[value["oid"]] if "oid" in value else None
            files[value["path"]] = content or base64.b64decode(value["content"])
        oid = f"{len(commits):040x}"
        commits.append((oid, files))
        self.reply({"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    "/api/repos/create": Handler.create,
    "/api/validate-yaml": Handler.yaml,
    f"/api/models/{NAME}/preupload/main": Handler.preupload,
    f"/api/models/{NAME}/commit/main": Handler.commit,
    f"/api/models/{NAME}/tree/(.+)": Handler.tree,
    f"/api/models/{NAME}(?:/revision/(.+))?": Handler.info,
    f"/{NAME}.git/info/lfs/objects/batch": Handler.batch,
    "/upload/(.+)": Handler.upload,
    f"/{NAME}/resolve/([^/]+)/(.+)": Handler.file,
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def run_folder(tmp_path):
    return shutil.copytree(ASSETS / "digits-dimo", tmp_path / "mine")


def test_what_was_pushed_draws_the_same_images(hub, dimo, tmp_path):
    said = dimo("export", "digits-dimo", "--push", "some/one")[1]
    assert f"hf://some/one@{1:040x}; sample it with: dimo sample --model hf://some/one" in said
    (_, first), (_, files) = hub.repositories["some/one"]
    assert files.keys() - first.keys() == {*FILES, "README.md"}
    assert files["student.safetensors"] == SHIPPED.read_bytes()
    assert not list(tmp_path.iterdir())
    labels = list(range(10))
    wanted = package.load("digits-dimo").sample(labels, seed=7)
    student = package.load("hf://some/one")
    assert torch.equal(student.sample(labels, seed=7), wanted)
    assert student.name == "Di[M]O (some/one)"
    assert student.weights_sha256 == SHA256
    dimo("export", "digits-dimo", "--format", "diffusers", "--push", "some/other")
    files = hub.commits("some/other")[-1][1]
    assert {"pipeline.py", "model_index.json"} <= files.keys()
    assert b'snapshot_download("some/other")' in files["README.md"]


def test_a_revision_is_kept_and_a_record_has_its_commit(hub, dimo, run_folder, monkeypatch):
    dimo("export", "digits-dimo", "--push", "some/one")
    config = json.loads((run_folder / "config.json").read_text())
    (run_folder / "config.json").write_text(json.dumps({**config, "temperature": 0.9}))
    dimo("export", "mine", "--push", "hf://some/one", "--force")
    first, second = (f"{number:040x}" for number in (1, 2))
    wanted = {"": (0.9, second), f"@{first}": (0.2, first), f"@{second}": (0.9, second)}
    for revision, (temperature, commit) in wanted.items():
        found = find_student(f"hf://some/one{revision}")
        assert found.config.temperature == temperature
        assert found.address == f"hf://some/one@{commit}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.log)
    planned = plan_models(["hf://some/one", f"x=hf://some/one@{first}@1,4"], [1])
    assert [entry.model for entry in planned] == [f"hf://some/one@{c}" for c in (second, first)]
    assert [len(entry.rows) for entry in planned] == [1, 2]
    assert len(hub.log) == asked
    with pytest.raises(DimoError, match=r"^cannot load hf://some/two: .*HF_HUB_OFFLINE=0"):
        find_student("hf://some/two")


@pytest.mark.parametrize(
    ("text", "model", "steps"),
    [
        ("hf://a/b@2,4", "hf://a/b", (2, 4)),
        ("n=hf://a/b@main", "hf://a/b@main", ()),
        ("hf://a/b@refs/pr/1@2", "hf://a/b@refs/pr/1", (2,)),
    ],
)
def test_steps_and_revision(text, model, steps):
    candidate = parse_candidate(text)
    assert (candidate.model, candidate.steps) == (model, steps)


def test_pushes_that_fail_leave_no_commit_and_say_what_to_do(hub, dimo, monkeypatch, tmp_path):
    files = [tmp_path / "README.md", tmp_path / "x.safetensors"]
    for file in files:
        file.write_text("content")

    def refused(said, repository="some/one"):
        before = {name: list(commits) for name, commits in hub.repositories.items()}
        with pytest.raises(DimoError, match=said) as caught:
            push(files, repository, message="x")
        assert "\n" not in str(caught.value)
        empty = hub.commits("some/empty")
        assert all(commits == before.get(n, empty) for n, commits in hub.repositories.items())

    push(files[:1], "some/one", message="x")
    refused("hf://some/one has README.md already; replace them with --force")
    refused("--push 'one' is no repository; give OWNER/REPO", "one")
    for path, status, said in (
        ("/commit/", 403, "settings/tokens"),
        ("/commit/", 404, "check the name"),
        ("/upload/", 403, "settings/tokens"),
    ):
        hub.refused = {path: status}
        refused(f"cannot push to hf://some/new: .*{status}.*{said}", "some/new")
    hub.refused = {}
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("cannot push to hf://some/other: .*401.*hf auth login", "some/other")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    refused("cannot push to .*check the connection", "some/new")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    refused("--push needs a token .* hf auth login, or set HF_TOKEN", "some/new")
    said = dimo("export", "digits-dimo", "--push", "some/new", "-o", "x.bin", code=2)[1]
    assert "x.bin is one file" in said


def test_a_student_of_a_local_teacher_is_not_pushed(hub, dimo, run_folder, tmp_path):
    config = json.loads((run_folder / "config.json").read_text())
    config["teacher"] = str(tmp_path / "local")
    (run_folder / "config.json").write_text(json.dumps(config))
    said = dimo("export", str(run_folder), "--push", "some/one", code=2)[1]
    assert "is the local folder" in said
    assert "would not load elsewhere" in said
    assert not hub.repositories


def test_a_push_is_refused_if_the_repository_moved_on(hub, monkeypatch, tmp_path):
    """What was there when files were compared must be there when they are replaced."""
    look = Handler.info

    def moved(self, name, revision, body):
        look(self, name, revision, body)
        hub.commits(name).append(("f" * 40, {"README.md": b"of somebody else"}))

    monkeypatch.setitem(ROUTES, f"/api/models/{NAME}(?:/revision/(.+))?", moved)
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(DimoError, match=r"412 .*changed meanwhile"):
        push([tmp_path / "README.md"], "some/one", message="x")
    assert hub.commits("some/one")[-1][1] == {"README.md": b"of somebody else"}


def test_what_is_no_student_or_was_changed_is_refused(hub, dimo):
    dimo("export", "digits-dimo", "--push", "some/one")
    files = hub.commits("some/one")[-1][1]
    damaged = files["student.safetensors"][:-1] + b"\0"
    unknown = json.dumps({**json.loads(files["config.json"]), "code": "x.py"}).encode()
    for number, (changes, said) in enumerate(
        (
            ({"student.safetensors": damaged}, f"have sha256 .*, but {SHA256} is recorded"),
            ({"config.json": unknown}, "'code'.*export and push the student again"),
        )
    ):
        hub.repositories[f"bad/{number}"] = [(f"{number + 7:040x}", {**files, **changes})]
        with pytest.raises(DimoError, match=said):
            package.load(f"hf://bad/{number}")
    hub.repositories["bad/other"] = [("b" * 40, {"model.safetensors": b"x"})]
    for address, said in (
        ("hf://bad/other", "is no student of dimo, it has no student.safetensors and no config"),
        ("hf://bad/none", "401 Client Error.*hf auth login"),
        ("hf://some/one@v2", "404 Client Error.*the revision"),
        ("hf://some", "give hf://OWNER/REPO"),
        ("hf://some/one@", "give hf://OWNER/REPO"),
    ):
        with pytest.raises(DimoError, match=said):
            package.load(address)


def records_with(word, folder):
    """A new folder of the results whose files have a word in them."""
    folder.mkdir()
    for path in RESULTS.glob("*.json"):
        if word in path.read_text():
            shutil.copy(path, folder)
    return load_all(folder)[0]


def test_the_card_has_the_results_of_these_weights_alone(dimo, tmp_path):
    known = records_with("digits-full", tmp_path / "results")
    (record,) = (r for r in known if r.method.weights_sha256 == SHA256)
    assert len(known) > 1
    dimo("export", "digits-dimo")
    card = (tmp_path / "digits-dimo" / "README.md").read_text()
    fid = record.metrics["fid"]
    rows = [line for line in card.splitlines() if line.startswith("| Di[M]O")]
    half = f"{(fid.high - fid.low) / 2:.3f}".removeprefix("0")
    assert len(rows) == 2  # results and settings
    assert f" {fid.value:.3f}±{half}" in rows[0]
    assert "**" not in rows[0]  # a single row is not the best
    assert "**Best**" not in card
    for known in (
        *("license: apache-2.0", 'dimo.load("hf://OWNER/REPO")', f"sha256 `{SHA256}`"),
        *(f"Protocol `digits`: sha256 `{record.protocol.sha256}`", "seed 1000", "Seed: 0"),
    ):
        assert known in card
    digest = (tmp_path / "digits-dimo" / "student.safetensors.sha256").read_text()
    assert digest == f"{SHA256}  student.safetensors\n"
    assert "--out" in dimo("export", "digits-dimo", code=2)[1]


def test_a_student_of_an_ablation_has_a_row_with_its_interval(tmp_path):
    ablated = records_with("b0-r1-s0-seed0", tmp_path / "results")[0]
    assert "ablation" in ablated.method.training
    digest = ablated.method.weights_sha256
    (part,) = read_report(tmp_path / "results", weights_sha256=digest).protocols
    assert [row.run_id for row in part.records] == [ablated.run_id]
    assert not part.excluded


def test_formats(dimo, tmp_path):
    dimo("export", "digits-dimo", "--format", "official")
    assert torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    said = dimo("export", "digits-dimo", "--format", "official", "-o", "x.safetensors", code=2)[1]
    assert "--format official does not fit -o x.safetensors" in said
    said = dimo("export", "digits-dimo", "--format", "diffuser", code=2)[1]
    assert "'diffuser'; allowed: diffusers, official, safetensors; did you mean" in said
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]
    dimo("export", "scenes-dimo", "-o", "scenes")
    card = (tmp_path / "scenes" / "README.md").read_text()
    assert "Not measured yet. Measure it with `dimo bench --student hf://OWNER/REPO" in card
    assert "pipeline_tag: text-to-image" in card
    assert "prompts=[" in card
