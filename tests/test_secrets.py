"""Nothing that a run writes carries a secret; nothing that is none is hidden; and the repository itself has none.

What this file plants stands in the baseline.
"""

import gzip
import importlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import Shell
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_ml import secrets
from codex_ml.cli.main import main
from codex_ml.cli.ndjson import main as ndjson
from codex_ml.config import TrainConfig, flatten
from codex_ml.provenance import environment, run_manifest
from codex_ml.secret_scan import BASELINE, files_in, read_baseline, scan, write_baseline
from codex_ml.secrets import Redactor, is_secret_name, redact
from codex_ml.strict_json import json_text, plain
from codex_ml.telemetry.record import event_record, scalar_record
from codex_ml.telemetry.sinks import Sinks
from codex_ml.train_loop import run_training

ROOT = Path(__file__).resolve().parent.parent
A = "aB3" * 20
# Put together here, so that this file holds none. Kind → the secret, in the text that it is met in.
PLANTED = {
    "AWS key": "AKIA" + "ABCDEFGH12345678", "GitHub token": "ghp_" + A[:36], "GitHub token 2": "github_pat_" + A[:40],
    "GitLab token": "glpat-" + A[:20], "Hugging Face token": "hf_" + A[:34], "API key": "sk-proj-" + A[:40],
    "API key 2": "sk_live_" + A[:24],
    "API key 3": "AIza" + A[:35], "Slack token": "xoxb-" + "123456789012-" + A[:24],
    "Slack token 2": "https://hooks." + "slack.com/services/T00000000/B00000000/" + A[:24],
    "package index token": "pypi-AgE" + A[:60], "package index token 2": "npm_" + A[:36],
    "JSON web token": "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
    "storage key": "AccountKey=" + "abcDEF12" * 8 + "==", "bearer token": "Bearer " + "abcdef0123456789abcdef",
    "password in a URL": "postgresql://me:" + "s3same-open" + "@db.example/x",
    "private key": "-----BEGIN RSA PRIVATE" + " KEY-----\nMIIEow" + A + "\n-----END RSA PRIVATE" + " KEY-----",
    "private key 2": "-----BEGIN OPENSSH PRIVATE" + " KEY-----\n" + A + "\n" + A,
    "bot token": "https://api.telegram.org/bot123456789:" + A[:35], "signature in a URL": "https://s/x?se=2026&sig=" + A[:43] + "%3D",
}
CORE = {"AWS key": 10, "storage key": 20, "bearer token": 12, "password in a URL": 0}


def core(text):
    """The part of a planted text that must not be left."""
    if "://me:" in text:
        return text.split(":")[2].split("@")[0]
    return text.split("=", 1)[1][:30] if text.startswith("AccountKey") else text.split()[-1] if text.startswith("Bearer") else text[-20:]


@pytest.fixture(params=["with detect-secrets", "without"])
def either(request, monkeypatch):
    """With the extra and without it: what is planted here is found by the core alone."""
    if request.param == "without":
        monkeypatch.setattr(secrets, "detectors", lambda: ())


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_secret_is_taken_out(either, kind):
    text = PLANTED[kind]
    for around in ("{}", "before {} after", "a\n{}\nb", '"{}"', "x={},y", "my_{}", "sx/run_{}", "'\\n{}'", "\x1b[31m{}"):
        clean = Redactor({}).text(around.format(text))
        assert core(text) not in clean and f"[redacted: {kind.rstrip(' 23')}]" in clean, clean
        assert Redactor({}).text(clean) == clean
    for value in ({"note": text}, [text], {text: 1}, {"a": {"b": (1, text)}}):
        assert core(text) not in json.dumps(redact(value))


@pytest.mark.parametrize("text", ("password=hunter2", "api_key = 'k-1'", '{"token": "abc"}', "Authorization: Basic dXNlcjpwYXNz",
                                  "--secret=x1y2",
                                  "model_args.api_key=k-1", "AWS_SECRET_ACCESS_KEY=wJalrX/K7MD", "passwd: hunter2!",
                                  'say \\"password\\": \\"hunter2\\"',
                                  "client_secret='it\"s'", "DB_PASS=x9", "see https://h/p?access_token=abc", "url=https://h?token=abc",
                                  "error:password=hunter2", "a=b:c=api_key=k-1", "403 for url: https://h/p?x=1&api_key=k-1: no",
                                  "https%3A%2F%2Fh%3Faccess_token%3Dabc%26x", "'no\\napi_key=k-1'", "login --password hunter2 -v",
                                  "--api-key k-1", "Command '['x', '--token', 'abc']' failed", "-password 'hunter2'",
                                  "Cookie: s=abc; x9=k-1", "API_KEY := k-1", 'password="hunter2',
                                  "curl -H 'Authorization: Bearer abc'", 'os.environ["API_KEY"] = "abc"',
                                  "ENV DB_PASSWORD hunter2", "pin=19x9".replace("x", "0")))
def test_a_named_value_in_a_text(either, text):
    clean = Redactor({}).text(text)
    assert "[redacted: key name]" in clean
    for value in ("hunter2", "k-1", "abc", "dXNlcjpwYXNz", "x1y2", "wJalrX", "it\"s", "x9", "1909"):
        assert value not in clean
    assert Redactor({}).text(clean) == clean


@pytest.mark.parametrize("token", ("ghp_" + "a1B2" * 9, "hf_" + "q1W2" * 9, "glpat-" + "aB3dE" * 4,
                                   "SG." + "a1" * 11 + "." + "b2" * 21 + "c"))
def test_every_occurrence_goes_whole(token):
    if token.startswith("SG."):
        pytest.importorskip("detect_secrets")
    clean = Redactor({}).text(f"my_{token} and /runs/{token}/{token}, once more my_{token}")
    assert "a1" not in clean and token[-8:] not in clean and clean.count("[redacted: ") == 4
    assert Redactor({}).text(f"x_{'ghp_' + 'a1B2' * 9}_loss") == "x_[redacted: GitHub token]_loss", "two metrics stay two"


def test_the_environments_own_values_wherever_they_turn_up():
    environ = {"WANDB_API_KEY": "0123456789abcdef0123", "MY_TOKEN": "kurz", "PWD": "/home/me/project", "DB_PASSWORD": 'with "quotes" in',
               "PATH": "/bin:/usr",
               "SSH_TOKEN": "abcd1234"}
    redactor = Redactor(environ)
    for text in ("key 0123456789abcdef0123!", "x0123456789abcdef0123x", "with \"quotes\" in", json.dumps(environ["DB_PASSWORD"]),
                 "abcd1234 too"):
        assert "[redacted: environment " in redactor.text(text)
    for text in ("kurz", "/home/me/project", "/bin:/usr", "abcd12345", "xabcd1234"):
        assert redactor.text(text) == text
    assert redactor.text("run_abcd1234_loss") == "run_[redacted: environment SSH_TOKEN]_loss"
    assert redactor({"a": ["0123456789abcdef0123"]}) == {"a": ["[redacted: environment WANDB_API_KEY]"]}


def test_secrets_inside_the_environments_values_and_short_ones():
    redactor = Redactor({"DATABASE_URL": "postgres://me:" + "hunter22@db/x", "PIP_INDEX_URL": "https://me:" + "p%40ss12@pypi/x",
                         "STORE": "Server=x;Password=Zx81zz;", "A_PASSWORD": "ab12cd", "B_PASSWORD": "admin", "C_TOKEN": "123456",
                         "D_TOKEN": "a-1"})
    for text, name in (("user me, hunter22", "DATABASE_URL"), ("p%40ss12!", "PIP_INDEX_URL"), ("p@ss12!", "PIP_INDEX_URL"),
                       ("Zx81zz", "STORE"), ("no ab12cd", "A_PASSWORD")):
        assert f"[redacted: environment {name}]" in redactor.text(text)
    for text in ("the admin", "step 123456", "gpt a-1", "me", "Server"):
        assert redactor.text(text) is text


def test_secrets_in_lists_of_words_and_in_named_values():
    assert redact(["x", "--password", "hunter2", "--steps", "5"]) == ["x", "--password", "[redacted: key name]", "--steps", "5"]
    assert redact([{"name": "api_key", "value": "k"}, {"key": "seed", "value": "k"}]) == [
        {"name": "api_key", "value": "[redacted: key name]"}, {"key": "seed", "value": "k"}]
    names = ("wandb_key", "openai_key", "OPENAI_KEY", "hf_key", "hugging_face_key", "cookie", "Set-Cookie", "session_cookie", "github.key")
    assert redact(dict.fromkeys(names, "k1")) == dict.fromkeys(names, "[redacted: key name]")
    pins = {"pin": "1234", "user_pin": 1234, "led_pin": 13, "pins": {"pin": "v1.2"}, "pin_memory": True, "pin_memory_device": "cuda"}
    assert redact(pins) == pins | {"pin": "[redacted: key name]", "user_pin": "[redacted: key name]"}


# ---- no false alarm

HARMLESS = ["sha256:" + "ab12" * 16, "0f3a" * 8, "550e8400-e29b-41d4-a716-446655440000", "2026-11-24T08:30:00.123456Z", "runs/a/epoch-0001",
            "/home/me/.cache/huggingface/token", "~/.ssh/id_ed25519.pem", "C:\\data\\x", "Linux-6.8.0-45-generic-x86_64-with-glibc2.36",
            "tokenizer=byte",
            "pad_token='<pad>'", "tokens_per_second=123.4", "key=value", "did you mean 'tokenizer'?", "https://user@host/path",
            "s3://bucket/key.json",
            "the key: value pairs", "seed=1234", "password: see the manual", "epoch 3/5  loss 2.5  tok/s 1200", "torch==2.13.0+cpu",
            "1.2.3.4", "8.8.8.8",
            "sk-learn-like-names-are-no-keys", "token=${HF_TOKEN}", "password=<yours>", "AKIA", "eyJ", "layers.0.attention.key.weight",
            "max_new_tokens=64",
            "no secrets in here", "sha256 d2c1f0", "model_args.key_dim=64", "cosine", "a b=c d:e", "x" * 5000, "0" * 64,
            "/data/tokens-2026.jsonl", "use --password to log in", "give --api-key KEY or set it", "--password: expected one argument",
            "codex-ml doctor --secrets runs/a1", "pin_memory=True", "--pin-memory 1234", "pin: v1.2", "token_count=123456", "monkey=abcd1",
            "author=me@x.org", "authors: a1b2c3", "keyboard=de1", "secretary: a1b2c3", "passenger=a1b2c3", "compass: north1",
            "hockey_key=c4", "std::token::next", "cookie policy: none", "2026-11-24 08:30:00:12345",
            "https://h/p?tokenizer=byte&max_new_tokens=64", "http://localhost:8080/a@b", "git+ssh://git@github.com:org/repo@v1",
            "docker://host:5000/image@sha256", "postgres://me:${DB_PASSWORD}@h/x", "https://me:{password}@h",
            "Authorization: Bearer tokens are", "lengths_" + "0f3a" * 10, "pip install tokenizers==0.21.4",
            "the pin: out of order", "metrics/val_token_accuracy=0.51", "loss: 2.5, tokens: 120000", "key: sort_by_length", "a[key]=value1"]


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_none_is_left(either, text):
    assert Redactor({}).text(text) is text
    assert Redactor({})({"note": text, "path": [text]})["note"] is text


def test_the_projects_own_configurations_and_manifests_are_left(either):
    flat = flatten(TrainConfig())
    manifest = run_manifest(environment=environment(), data_fingerprint="sha256:" + "9f" * 32, model_params=10)
    redactor = Redactor({})
    assert redactor(flat) is flat and redactor(manifest) is manifest
    for path in (ROOT / "settings.ini", ROOT / "pyproject.toml", ROOT / "constraints.txt", ROOT / "tests/golden.json", ROOT / "README.md",
                 ROOT / "CHANGELOG.md", ROOT / "LICENSE", ROOT / "Makefile"):
        for line in path.read_text().splitlines():
            assert redactor.text(line) == line
    assert not [key for key in flat if is_secret_name(key)]


def test_numbers_paths_and_structure_stay():
    value = {"token": 50256, "api_key": None, "password": True, "secret": "", "private_key": "keys/sign.pem", "secret_key": "$KEY",
             "n": 1e300, "pin_password": 123456}
    assert redact(value) == value | {"pin_password": "[redacted: key name]"}
    nested = redact({"credentials": {"user": "me", "pass": "geheim", "port": 80}, "list": [{"api_key": "k1"}]})
    assert nested == {"credentials": {"user": "[redacted: key name]", "pass": "[redacted: key name]", "port": 80},
                      "list": [{"api_key": "[redacted: key name]"}]}
    assert len(redact({PLANTED["GitHub token"]: 1, "ghp_" + "x" * 36: 2})) == 2, "keys that are secrets stay apart"


leaves = st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text() | st.sampled_from(sorted(PLANTED.values()))
trees = st.recursive(leaves,
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.sampled_from(["password", "api_key", "x"]),
                                                                                 inner, max_size=3),
                     max_leaves=12)


@settings(max_examples=300, deadline=None)
@given(trees, st.text(), st.text())
def test_json_stays_json(tree, before, after):
    text = json.dumps({"a": tree})
    new = json.loads(redact(text))
    assert json.loads(json.dumps(redact({"a": tree}))) == new
    for secret in PLANTED.values():
        assert core(secret) not in json.dumps(new)
    redact(before + "password=" + after)  # whatever comes, it comes back


def test_no_text_takes_long():
    for text in ("a" * 300_000, "sk-" * 100_000, "eyJ-" * 50_000, "://" * 100_000, "password " * 30_000,
                 "-----BEGIN PRIVATE" + " KEY-----" * 9000,
                 "bearer " * 40_000, "password='" * 30_000, "{" * 90_000 + "}" * 90_000, "a1" * 150_000, "token=" * 50_000):
        begun = time.perf_counter()
        Redactor({}).text(text)
        assert time.perf_counter() - begun < 5, text[:20]


@settings(max_examples=150, deadline=None)
@given(trees, st.text())
def test_where_the_redactor_was_the_doctor_finds_nothing(tmp_path_factory, tree, text):
    folder = tmp_path_factory.getbasetemp() / "agree"
    folder.mkdir(exist_ok=True)
    value = {"a": tree, "note": text, "source": f"https://h?token={text}", "secret_file": "x.pem.old", "password_length": "12",
             "api_key_of": "me", "list": ["--password", text], "e": {"name": "pin", "value": text}}
    clean = redact(plain(value))
    (folder / "config.snapshot.json").write_text(json_text(clean))
    (folder / "metrics.ndjson").write_text(json.dumps(clean) + "\n")
    assert scan(files_in(folder), folder) == []


# ---- a scalar costs next to nothing


def test_a_number_is_not_held_up(monkeypatch):
    looks, find = [], secrets.secrets_in
    monkeypatch.setattr(secrets, "secrets_in", lambda text, *given: looks.append(text) or find(text, *given))
    redactor = Redactor()
    for step in range(1000):
        record = scalar_record("0f3a", step, "train", "loss", step / 7)
        assert redactor.record(record) is record
    assert sorted(looks) == ["loss", "train"], "each text of all these records is looked at once"
    tagged = scalar_record("0f3a", 10, "train", "loss", 2.5, tags={"phase": "train"})
    assert redactor.record(tagged) is tagged and redactor.record(tagged) is tagged
    for hidden in (scalar_record("0f3a", 1, "train", "api_key", "train"), scalar_record("0f3a", 1, "x", "m", 1.0, tags={"token": "train"})):
        assert redactor.record(hidden) is not hidden, "a text that is harmless elsewhere is none under the name of a secret"


# ---- every place that a run writes to

HF, KEY = "hf_" + "q1W2" * 9, "tr0ub4dor&3-horse"


class Memory:
    def __init__(self):
        self.records = []

    def emit(self, record):
        self.records.append(record)

    def flush(self):
        pass

    close = flush


def test_every_sink_gets_clean_records(monkeypatch):
    monkeypatch.setenv("STORE_PASSWORD", KEY)
    sinks, memory = Sinks({"a": Memory(), "b": Memory()}, "0f3a"), []
    sinks.log(1, "train", {"note": f"logged in with {HF}", "loss": 1.0, "api_key": "abcd"}, dataset=f"https://me:{'geheim1'}@x",
              tags={"token": "t-1"})
    sinks.event("start", data={"config": {"password": "hunter2"}, "error": ValueError(f"refused {KEY}")})
    sinks.structured(1, "train", "m", "kind", {"text": HF})
    sinks.snapshot({"cpu": 0.5})
    monkeypatch.setenv("NEW_SECRET", "set-later-0001")
    sinks.record(event_record("0f3a", 2, "later", data={"text": "set-later-0001"}))
    for sink in sinks.sinks.values():
        text = json.dumps(sink.records, default=str)
        memory.append(text)
        for secret in (HF, KEY, "geheim1", "t-1", "hunter2", "set-later-0001", "abcd"):
            assert secret not in text
        assert next(r for r in sink.records if r.get("metric") == "loss")["value"] == 1.0
    assert memory[0] == memory[1] and sinks.errors == {}


def everything(folder):
    """The bytes of all files below, archives of metrics unpacked."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[path] = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return found


URL_TOKEN = "Qw3rTy88" + "SecretVal"


class Talks:
    """A callback with a secret in all that it says."""

    def on_train_end(self, state):
        raise OSError(f"403 Client Error: Forbidden for url: https://hub/data?access_token={URL_TOKEN}")

    def on_epoch_end(self, epoch, metrics, state):
        logging.getLogger("codex_ml").warning("the store says: token %s", HF)
        return {"note": KEY, f"loss_{'ghp_' + A[:36]}": 1.0}


def job(folder, **keywords):
    import torch

    generator = torch.Generator().manual_seed(0)
    data = torch.randn(24, 4, generator=generator), torch.randint(0, 3, (24,), generator=generator)
    return run_training(**{"model": "mlp", "data": data, "epochs": 2, "batch_size": 8, "threads": 1, "progress": "off",
                           "checkpoint_dir": folder,
                           "log_every_steps": 1, "tensorboard": True} | keywords)


def test_a_whole_run_writes_no_secret(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("STORE_PASSWORD", KEY)
    monkeypatch.setenv("GIT_SHA", HF)  # somebody took the wrong variable
    told = {"epochs": 2, "store": {"password": "hunter22", "url": "https://me:geheim1@store/x"}, "note": f"use {HF}",
            "model_args": {"dropout": 0.1}, "source": f"https://hub/data?access_token={URL_TOKEN}",
            "checkpoint": {"dir": str(tmp_path / "run")}, KEY: 1}
    first = job(tmp_path / "run", run_config=told, callbacks=[Talks()])
    plain = job(tmp_path / "plain", run_config={"model_args": {"dropout": 0.1}})
    assert first["checkpoint_sha256_last"] == plain["checkpoint_sha256_last"], "what is redacted decides no bit"
    job(tmp_path / "run", epochs=3, resume=True, run_config=told, callbacks=[Talks()])
    files = everything(tmp_path / "run")
    assert len(files) > 12
    for path, content in files.items():
        for secret in (HF, KEY, "hunter22", "geheim1", URL_TOKEN, A[:36]):
            assert secret.encode() not in content, path
    assert URL_TOKEN not in caplog.text and "https://hub/data?access_token=[redacted: key name]" in caplog.text
    told_error = first["callback_errors"][0]["error"]
    assert told_error.endswith("for url: https://hub/data?access_token=[redacted: key name]")
    assert HF not in caplog.text and "[redacted: Hugging Face token]" in caplog.text
    snapshot = json.loads((tmp_path / "run" / "config.snapshot.json").read_text())
    assert snapshot["store"] == {"password": "[redacted: key name]", "url": "https://me:[redacted: password in a URL]@store/x"}
    assert snapshot["epochs"] == 2 and snapshot["checkpoint"]["dir"] == str(tmp_path / "run")
    assert scan(files_in(tmp_path / "run"), tmp_path) == []


def test_the_identity_of_a_run_has_no_secret_and_a_new_token_is_no_drift(tmp_path):
    def model(token=""):
        import torch

        return torch.nn.Linear(4, 3)

    from codex_ml.registry import register

    register("models", "with_token", lambda token="": model(), override=True)
    for epochs, token in ((1, HF), (2, "hf_" + "z9Y8" * 9)):
        result = job(tmp_path / "run", model="with_token", model_args={"token": token}, epochs=epochs, resume=True, tensorboard=False)
    assert result["resumed_from_epoch"] == 1 and result["resume_meta"]["drift"] == []
    identity = json.loads((tmp_path / "run" / "epoch-0002" / "metadata.json").read_text())["identity"]
    assert identity["model_args"] == {"token": "[redacted: key name]"}
    assert not [path for path, content in everything(tmp_path / "run").items() if HF.encode() in content or b"z9Y8z9Y8" in content]


def test_a_log_and_its_tracebacks():
    stream = io.StringIO()
    log, handler = logging.getLogger("codex_ml"), logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        try:
            raise ValueError(f"refused: {HF}")
        except ValueError:
            log.exception("cannot store with password=%s", "hunter22")
        log.warning("100%% of %s", "it")
        logging.getLogger("codex_ml.sub.part").warning("below: %s", HF, stack_info=True)
    finally:
        log.removeHandler(handler)
    text = stream.getvalue()
    assert HF not in text and "hunter22" not in text and "Traceback" in text and "100% of it" in text and "below: [redacted: " in text


def test_the_log_of_others_is_theirs(caplog):
    logging.getLogger("codex_mlx").warning("password=%s", "hunter33")
    importlib.reload(secrets)  # as a notebook does: records are made once, and still without secrets
    logging.getLogger("codex_ml.x").warning("password=%s", "hunter44")
    assert "password=hunter33" in caplog.text and "hunter44" not in caplog.text


WARNS = """
import logging, sys, warnings
if sys.argv[1] == "captured":
    logging.captureWarnings(True)
before = warnings.showwarning
from codex_ml.secrets import detectors, redact
redact("x_" + "a1B2" * 9)
assert detectors() and "detect_secrets" in sys.modules
assert warnings.showwarning is before, "warnings go elsewhere now"
logging.captureWarnings(True)
assert warnings.showwarning is not before or sys.argv[1] == "captured"
"""


@pytest.mark.parametrize("how", ("shown", "captured"))
def test_warnings_go_where_they_went(how):
    "detect-secrets sends all warnings of a process to its log as soon as it is imported."
    pytest.importorskip("detect_secrets")
    done = subprocess.run([sys.executable, "-c", WARNS, how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the command line


@pytest.fixture(scope="module")
def shell():
    with Shell() as shell:
        yield shell


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "settings.ini").write_text("[codex_ml]\n")
    return folder


@pytest.mark.parametrize("words", (["data=https://me:geheim1@store/x.txt"], [f"model_name={HF}"], ["data=text.txt",
                                                                                                   "model_args.api_key=hunter22"],
                                   [f"checkpoint.dirr={HF}"], [f"seed={HF}"], [f"scheduler.type={KEY}"]))
def test_a_message_has_none(shell, work, words):
    script = f"import os, sys\nos.environ['STORE_PASSWORD'] = {KEY!r}\nfrom codex_ml.cli.train import main\nsys.exit(main({words!r}))"
    code, out, err = shell.run(work, script=script)
    assert code == 2 and err.count("\n") == 1
    for secret in (HF, KEY, "geheim1", "hunter22"):
        assert secret not in err + out


def test_an_unexpected_error_shows_its_traceback_without_secrets(shell, work):
    script = f"""
import sys
import codex_ml.cli.train as train
def broken(*words): raise RuntimeError("cannot reach https://me:geheim1@store with {HF}")
train._train = broken
sys.exit(train.main(["epochs=1"]))
"""
    code, _, err = shell.run(work, script=script)
    assert code == 1 and "Traceback" in err and "in broken" in err and "[redacted: Hugging Face token]" in err
    assert HF not in err and "geheim1" not in err


def test_the_report_of_a_run_has_no_secret(shell, work):
    (work / "text.txt").write_text("one two three four five six seven\n" * 60)
    token = "ghp_" + A[:36]
    words = ["data=text.txt", "model_name=tiny", "block_size=16", "epochs=1", "steps_per_epoch=2", "batch_size=2", "progress=off",
             f"checkpoint.dir=sx/{token}"]
    code, out, err = shell.run(work, script=f"import sys\nfrom codex_ml.cli.train import main\nsys.exit(main({words!r}))")
    assert code == 0, err
    assert token not in out + err and "sx/[redacted: GitHub token]/epoch-0001" in out


# ---- every other command


@pytest.fixture(scope="module")
def told_run(tmp_path_factory):
    """A run that its folder describes whole."""
    place = tmp_path_factory.mktemp("told")
    (place / "text.txt").write_text("".join(f"{i} and {i % 7} make {i + i % 7}\n" for i in range(120)))
    run_training(model="tiny", data=place / "text.txt", block_size=16, epochs=2, batch_size=8, progress="off", threads=1,
                 checkpoint_dir=place / "run")
    return place / "run"


def set_value(run, name, value):
    """A value of the recorded configuration, as a hand or another program would write it there."""
    file = run / "config.resolved.json"
    told = json.loads(file.read_text())
    told["values"][name]["value"] = value
    if name in told["identity"]:
        told["identity"][name] = value
    file.write_text(json.dumps(told))


WORDS = {"evaluate": ["{}"], "replay": ["{}"], "diff": ["{}", "{}"], "verify": ["{}"], "keys trust": ["{}.pem"],
         "keys list": ["--keys", "{}"],
         "watch": ["{}"], "compare": ["{}"], "export": ["{}", "--to", "csv"], "doctor": ["--secrets", "{}"], "{}": []}


@pytest.mark.parametrize("command", WORDS)
def test_a_commands_message_has_no_secret_of_the_environment(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setenv("STORE_PASSWORD", KEY)
    monkeypatch.chdir(tmp_path)
    words = [word.format(f"runs-{KEY}") for word in [*command.split(), *WORDS[command]]]
    code = main(words)
    said = capsys.readouterr()
    assert code in (2, 5) or command == "keys list"
    assert KEY not in said.out + said.err and "[redacted: environment STORE_PASSWORD]" in said.out + said.err
    assert (said.out + said.err).count("\n") == 1


@pytest.mark.parametrize("words", (["validate"], ["tail"], ["summarize", "--output", "csv", "--dest", "x.csv", "--input"]))
def test_the_readers_of_metrics_say_none_either(tmp_path, monkeypatch, capsys, words):
    monkeypatch.setenv("STORE_PASSWORD", KEY)
    monkeypatch.chdir(tmp_path)
    assert ndjson([*words, f"runs-{KEY}"]) == 2
    said = capsys.readouterr()
    assert KEY not in said.out + said.err and "[redacted: environment STORE_PASSWORD]" in said.err
    (tmp_path / "metrics.ndjson").write_text(json.dumps({"$schema": "codex_ml/metrics.v1", "split": KEY}) + "\n")
    ndjson([*words, "metrics.ndjson"])
    said = capsys.readouterr()
    assert KEY not in said.out + said.err


@pytest.mark.parametrize("command", ("evaluate", "replay"))
@pytest.mark.parametrize(("name", "value"), (("data", "https://me:geheim1@store/x.txt"), ("data", f"/nowhere/{HF}.txt"), ("model_name", HF),
                                             ("tokenizer", KEY)))
def test_a_value_of_the_configuration_in_an_error_is_without_secrets(told_run, tmp_path, monkeypatch, capsys, command, name, value):
    run = tmp_path / "run"
    shutil.copytree(told_run, run)
    monkeypatch.setenv("STORE_PASSWORD", KEY)
    set_value(run, name, value)
    for file in run.glob("epoch-*/metadata.json"):  # a replay goes by what each stretch of the run was
        told = json.loads(file.read_text())
        if name in told["identity"]:
            told["identity"][name] = value
            file.write_text(json.dumps(told))
    (run / "tokenizer.json").unlink(missing_ok=True)
    for file in run.glob(".codex/*"):  # where the configuration stands once more, as it was
        file.unlink()
    code = main([command, str(run)])
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and "[redacted: " in err
    for secret in (HF, KEY, "geheim1"):
        assert secret not in err


@pytest.mark.parametrize("words", (["diff"], ["diff", "--json"], ["compare"]))
def test_a_secret_that_differs_is_told_without_its_value(told_run, tmp_path, capsys, words):
    folders = [tmp_path / name for name in "ab"]
    for folder, value in zip(folders, ("hunter22", "hunter33"), strict=True):
        shutil.copytree(told_run, folder)
        set_value(folder, "model_args", {"api_key": value})
        metrics = folder / ".codex/metrics.ndjson"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        for row in rows:
            if row.get("event") == "run_start":
                row["data"]["config"]["model_args.api_key"] = value
                row["data"]["config"]["model_args"] = {"api_key": value}
        metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([words[0], *map(str, folders), *words[1:]]) == 0
    out = capsys.readouterr().out
    assert "hunter" not in out and "api_key" in out and "[redacted: key name" in out  # a column may be narrower


@pytest.mark.parametrize("words", (["evaluate", "run"], ["replay", "run"], ["diff", "run", "run"], ["verify", "run"],
                                   ["export", "run", "--to", "csv"]))
def test_an_error_of_a_command_that_nobody_expected(monkeypatch, capsys, words):
    def broken(*given, **named):
        raise RuntimeError(f"cannot reach https://me:geheim1@store with {HF}")

    module, name = {"evaluate": ("evaluate_run", "evaluate_run"), "replay": ("replay", "replay"), "diff": ("first_difference",) * 2,
                    "verify": ("integrity", "verify_run"), "export": ("telemetry.export", "export_run")}[words[0]]
    monkeypatch.setattr(importlib.import_module(f"codex_ml.{module}"), name, broken)
    if words[0] == "evaluate":
        monkeypatch.setattr("codex_ml.evaluate_run.evaluation_of", broken)
    assert main(words) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "[redacted: Hugging Face token]" in err and HF not in err and "geheim1" not in err


# ---- looking for secrets


def doctor(*words, capsys=None):
    code = main(["doctor", "--secrets", *map(str, words)])
    return code, capsys.readouterr().out if capsys else ""


def notebook(path, source="x = 1\n", output=""):
    cell = {"cell_type": "code", "source": source.splitlines(True), "metadata": {}, "outputs": [
        {"output_type": "stream", "name": "stdout", "text": output.splitlines(True)}] if output else []}
    path.write_text(json.dumps({"cells": [cell], "nbformat": 4}, indent=1))


def test_the_doctor_names_file_line_and_kind_and_never_the_secret(tmp_path, capsys):
    notebook(tmp_path / "a.ipynb", f"import os\ntoken = '{HF}'\n")
    notebook(tmp_path / "b.ipynb", output=f"ok\nlogged in: {PLANTED['GitHub token']}\n")
    notebook(tmp_path / "c.ipynb", 'api_key = "abcd-1234"\n')
    (tmp_path / ".env").write_text("WANDB_API_KEY=0123456789abcdef\n")
    with gzip.open(tmp_path / "metrics.ndjson.1.gz", "wt") as file:
        file.write("{}\n{\"value\": \"" + PLANTED["AWS key"] + "\"}\n")
    (tmp_path / "x.py").write_text(f"one = '{HF}'  # pragma: allowlist secret\n")
    (tmp_path / "weights.bin").write_bytes(b"\0\1" + HF.encode())
    code, out = doctor(tmp_path, capsys=capsys)
    assert code == 6
    lines = [line for line in out.splitlines() if ": " in line and line[0] != "6"]
    found = [line.split(":")[0] for line in lines if line.count(":") == 2]
    assert found == [".env", "a.ipynb", "b.ipynb", "c.ipynb", "metrics.ndjson.1.gz"], "each once"
    assert "6 files, 5 secrets" in out
    assert "b.ipynb:15: GitHub token" in out and "metrics.ndjson.1.gz:2: AWS key" in out and "x.py" not in out
    assert out.endswith("; not looked at: weights.bin (not a text)\n")
    for secret in (HF, PLANTED["GitHub token"], PLANTED["AWS key"], "abcd-1234", "0123456789abcdef"):
        assert secret not in out
    assert doctor(tmp_path / "a.ipynb", capsys=capsys)[0] == 6
    assert doctor(tmp_path, "--accept", capsys=capsys)[0] == 0 and doctor(tmp_path, capsys=capsys)[0] == 0
    assert HF not in (tmp_path / BASELINE).read_text()
    notebook(tmp_path / "d.ipynb", output=PLANTED["Slack token"] + "\n")
    code, out = doctor(tmp_path, capsys=capsys)
    assert code == 6 and "d.ipynb" in out and "a.ipynb" not in out


@pytest.mark.parametrize(("name", "text"), (
    ("Dockerfile", "FROM x\nENV DB_PASSWORD=hunter22x\n"), ("Dockerfile", "FROM x\nENV DB_PASSWORD hunter22x\n"),
    ("a.sh", "set -e\nexport DB_PASSWORD=hunter22x\n"), ("a.sh", "set -e\ncurl --password hunter22x\n"),
    ("plain", "x\npassword=hunter22x\n"), ("Makefile", "x:\nTOKEN ?= hunter22x\n"),
    ("notes.txt", "see\nhttps://h/p?access_token=hunter22x\n"), ("a.py", "x\nu = 'https://h/p?access_token=hunter22x'\n"),
    ("a.py", "x\nrun(['--password', 'hunter22x'])\n"), ("a.md", "see\n    export DB_PASSWORD=hunter22x\n"),
    ("a.yaml", "x:\n  password: hunter22x\n"), ("a.json", '{\n "password": "hunter22x"\n}'),
    ("a.json", '{\n "note": "a password=hunter22x"\n}')), ids=range(13))  # an id of their own: what runs stands in the environment
def test_where_the_doctor_has_to_look(tmp_path, capsys, name, text):
    (tmp_path / name).write_text(text)
    code, out = doctor(tmp_path, capsys=capsys)
    assert code == 6 and out.startswith(f"{name}:2: key name\n1 files, 1 secret:"), out


@pytest.mark.parametrize(("name", "text"), (
    ("a.sh", "export TOKEN=$1 PASSWORD=$password API_KEY=$(cat key)\n"), ("a.py", "login(password=args.password1, token=token)\n"),
    ("a.md", "`doctor --secrets runs/a1` and `--password`: see there\n"), ("Makefile", "TOKEN := $(shell cat x)\n"),
    ("flow.yml", "token: ${{ secrets.TOKEN }}\n"), ("plain", "key = value\nauthor: somebody1\n"), ("a.py", "API_KEY=os.environ\n")),
                         ids=range(7))
def test_where_the_doctor_sees_none(tmp_path, capsys, name, text):
    (tmp_path / name).write_text(text)
    assert doctor(tmp_path, capsys=capsys) == (0, "1 files, 0 secrets\n")


def test_the_doctor_reads_every_form_of_text(tmp_path, capsys):
    for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "latin-1"):
        (tmp_path / name).write_bytes(f"one\r\ntoken: {HF}\r\n".encode(name))
    cell = {"cell_type": "code", "source": "import os\napi_key = \"abcd-1234\"\n", "metadata": {}, "outputs": []}
    (tmp_path / "string.ipynb").write_text(json.dumps({"cells": [cell]}, indent=1))
    (tmp_path / "small.ipynb").write_text(json.dumps({"cells": [cell]}))
    (tmp_path / "nul.txt").write_text("x" * 9000 + f"\0\n{HF}\n")
    code, out = doctor(tmp_path, capsys=capsys)
    lines = out.splitlines()
    assert code == 6 and lines[:-1] == ["latin-1:2: Hugging Face token", "nul.txt:2: Hugging Face token", "small.ipynb:1: key name",
                                        "string.ipynb:5: key name", *(f"{name}:2: Hugging Face token" for name in
                                                                      ("utf-16", "utf-16-be", "utf-16-le", "utf-8-sig"))]
    assert lines[-1].startswith("8 files, 8 secrets:") and "not looked at" not in out


def test_one_secret_is_told_once(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(["token = '" + PLANTED["GitHub token"] + "'", "api_key: " + PLANTED["AWS key"],
                                               PLANTED["password in a URL"], "x_" + PLANTED["Slack token"]]) + "\n")
    code, out = doctor(tmp_path, capsys=capsys)
    assert code == 6 and [line.split(":")[1] for line in out.splitlines()[:-1]] == ["1", "2", "3", "4"], out


def test_what_the_doctor_did_not_look_at(tmp_path, capsys, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "weights.pt").write_bytes(b"PK\3\4" + bytes(60) + HF.encode())
    (tmp_path / "torn.gz").write_bytes(gzip.compress(os.urandom(400).hex().encode())[:200])
    assert doctor(tmp_path / "pipe", capsys=capsys) == (2, "0 files, 0 secrets; not looked at: pipe (is not a regular file)\n")
    assert doctor(tmp_path / "weights.pt", capsys=capsys) == (2, "0 files, 0 secrets; not looked at: weights.pt (not a text)\n")
    code, out = doctor(tmp_path, capsys=capsys)
    assert code == 0 and out.startswith("1 files, 0 secrets; not looked at: pipe (is not a regular file), torn.gz (only its beginning: ")
    real = os.open

    def closed(path, *arguments, **keywords):
        if str(path).endswith("closed.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", closed)
    (tmp_path / "closed.txt").write_text(HF)
    code, out = doctor(tmp_path, capsys=capsys)
    assert code == 5 and "closed.txt (Permission denied)" in out, "what could hold one was not seen"
    (tmp_path / "open.txt").write_text(HF)
    code, out = doctor(tmp_path, capsys=capsys)
    assert code == 6 and "open.txt:1: Hugging Face token" in out and "2 files, 1 secret:" in out
    for i in range(20):
        (tmp_path / f"w{i:02}.bin").write_bytes(b"\0\1\2")
    assert doctor(tmp_path, capsys=capsys)[1].endswith(" and 14 more\n")


def test_the_doctor_on_odd_things(tmp_path, capsys):
    assert doctor(tmp_path / "nowhere", capsys=capsys)[0] == 2
    (tmp_path / "link").symlink_to("/etc")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"x" * 100)[:20])
    (tmp_path / "latin").write_bytes(b"\xff\xfe\xe9" * 100)
    assert doctor(tmp_path, capsys=capsys)[0] == 0
    assert doctor(tmp_path / "pipe", capsys=capsys)[0] == 2
    (tmp_path / BASELINE).write_text('{"known": [1]}')
    assert doctor(tmp_path, capsys=capsys)[0] == 2


# ---- the repository itself


def own_files(root=ROOT):
    """What the repository holds; without git, all but what the tools keep for themselves."""
    done = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, text=True)
    names = done.stdout.split("\0") if done.returncode == 0 else []
    listed = [root / name for name in names if name and (root / name).is_file()]
    return listed or [p for p in files_in(root) if not {"runs", "_docs", "_proc", "build"} & set(p.relative_to(root).parts)]


def unknown(paths, root, baseline):
    known = read_baseline(baseline)
    return [finding for finding in scan((p for p in paths if p.name != BASELINE), root) if finding.known_by not in known]


def test_the_repository_has_no_secret():
    pytest.importorskip("detect_secrets")
    paths = own_files()
    assert len([p for p in paths if p.suffix == ".ipynb"]) > 50
    new = [str(finding) for finding in unknown(paths, ROOT, ROOT / BASELINE)]
    assert new == [], "take them out; where they are none: python tests/test_secrets.py --accept"


def test_a_secret_that_is_planted_turns_it_red(tmp_path):
    for name in ("nbs/00_durable.ipynb", "nbs/index.ipynb", "settings.ini", "codex_ml/durable.py", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    paths = list(files_in(tmp_path))
    assert unknown(paths, tmp_path, ROOT / BASELINE) == []
    path = tmp_path / "nbs/00_durable.ipynb"
    content = json.loads(path.read_text())
    cell = next(c for c in content["cells"] if c["cell_type"] == "code")
    cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": [f"token: {HF}\n"]}]
    path.write_text(json.dumps(content, indent=1))
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text() + "\nmodel_args.api_key = k-12345\n")
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text() + "\nexport WANDB_API_KEY='0123456789abcdef'\n")
    assert {f.path for f in unknown(paths, tmp_path, ROOT / BASELINE)} == {"nbs/00_durable.ipynb", "settings.ini", "README.md"}


def test_the_baseline_has_nothing_that_is_gone():
    pytest.importorskip("detect_secrets")
    found = {finding.known_by for finding in scan([p for p in own_files() if p.name != BASELINE], ROOT)}
    assert sorted(read_baseline(ROOT / BASELINE) - found) == []


def test_a_run_without_secrets_imports_no_detector(tmp_path):
    script = ("import sys, codex_ml.secrets as s; s.redact({'data': 'runs/a', 'seed': 1}); "
              "print('detect_secrets' in sys.modules, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "False"], done.stderr


if __name__ == "__main__" and sys.argv[1:] == ["--accept"]:
    write_baseline(ROOT / BASELINE, scan([p for p in own_files() if p.name != BASELINE], ROOT))
