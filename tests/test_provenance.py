import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codex_ml import provenance
from codex_ml.provenance import LOCK_FILES, differences, environment, lock_sha256, run_manifest
from codex_ml.strict_json import write_json


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "src" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "src" / "deep")
    return tmp_path


FIRST = ["python", "platform", "git_sha", "lock_sha256", "env"]


def test_the_seeds_keys_come_first(project, monkeypatch):
    monkeypatch.setenv("GIT_SHA", "0123abc")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.delenv("CODEX_AUDIT", raising=False)
    (project / "uv.lock").write_bytes(b"version = 1\n")
    manifest = run_manifest(model_params=3)
    assert list(manifest)[:5] == FIRST and manifest["git_sha"] == "0123abc"
    assert manifest["lock_sha256"] == hashlib.sha256(b"version = 1\n").hexdigest() and manifest["lock_file"] == "uv.lock"
    assert manifest["env"]["PYTHONHASHSEED"] == "0" and manifest["env"]["CODEX_AUDIT"] is None
    assert set(manifest["env"]) == {"PYTHONHASHSEED", "CODEX_AUDIT", "CODEX_DDP"}
    assert manifest["model_params"] == 3 and manifest["python"] == platform.python_version()


def test_the_order_of_lock_files(project):
    assert lock_sha256() is None
    for name in reversed(LOCK_FILES):
        (project / name).write_text(name)
        assert lock_sha256() == (name, hashlib.sha256(name.encode()).hexdigest())
    assert LOCK_FILES[:2] == ("uv.lock", "uv.lock.json") and "constraints.txt" in LOCK_FILES


def test_it_looks_no_further_than_the_project(project):
    inner = project / "src"
    (project / "uv.lock").touch()
    (inner / ".git").touch()  # a worktree's .git is a file
    assert lock_sha256(inner / "deep") is None
    (inner / ".git").unlink()
    assert lock_sha256(inner / "deep")[0] == "uv.lock"


def test_a_linked_lock_file(project):
    (project / "shared.lock").write_bytes(b"x")
    (project / "uv.lock").symlink_to("shared.lock")
    assert lock_sha256() == ("uv.lock", hashlib.sha256(b"x").hexdigest())


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling", "loop"])
def test_what_is_no_file_is_passed_over(project, kind):
    lock = project / "uv.lock"
    {"folder": lock.mkdir, "pipe": lambda: os.mkfifo(lock), "dangling": lambda: lock.symlink_to("gone"),
     "loop": lambda: lock.symlink_to("uv.lock")}[kind]()
    (project / "constraints.txt").write_text("torch\n")
    assert run_manifest()["lock_file"] == "constraints.txt"


def test_a_working_folder_that_is_gone(tmp_path):
    code = """
import json, os, sys
gone = sys.argv[1]
from codex_ml.provenance import run_manifest
os.makedirs(gone); os.chdir(gone); os.rmdir(gone)
print(json.dumps(run_manifest()["lock_sha256"]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "gone")], capture_output=True, text=True)
    assert done.stdout == "null\n", done.stderr


def refuse(*arguments, **keywords):
    raise PermissionError(13, "Permission denied")


def test_nothing_that_fails_gets_out(project, monkeypatch):
    (project / "uv.lock").touch()
    monkeypatch.setattr(provenance, "sha256_file", refuse)
    monkeypatch.setattr(provenance, "environment_fingerprint", refuse)
    monkeypatch.setattr(platform, "platform", refuse)
    manifest = run_manifest(fact=1)
    assert manifest["lock_sha256"] is manifest["platform"] is None and manifest["fact"] == 1
    assert list(manifest)[:5] == FIRST
    assert environment("cpu") == environment("cuda") == environment("no such device") == {}


class Hostile:
    def __str__(self):
        raise RuntimeError("no")


def test_whatever_the_facts_are_it_can_be_written(tmp_path):
    cycle = {}
    cycle["self"] = cycle
    manifest = run_manifest(nan=math.nan, inf=[math.inf], device=torch.device("cpu"), path=Path("a"), half="a\ud800", key={("a", 1): {2}},
                            hostile=Hostile(), cycle=cycle, dtype=torch.float32, count=3, ratio=0.5)
    write_json(tmp_path / "run_manifest.json", manifest)
    assert manifest["nan"] == "NaN" and manifest["device"] == "cpu" and manifest["half"] == "a?" and manifest["count"] == 3
    assert manifest["hostile"] is manifest["cycle"] is None and manifest["key"] == {"('a', 1)": [2]} and manifest["ratio"] == 0.5


def test_variables_that_are_not_text(tmp_path):
    code = "import sys; from codex_ml.provenance import *; from codex_ml.strict_json import *; write_json(sys.argv[1], run_manifest())"
    variables = {**os.environb, b"GIT_SHA": b"\xff\xfe", b"CODEX_AUDIT": b"\xff"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.json")], env=variables, check=True)
    assert json.loads((tmp_path / "m.json").read_text())["git_sha"] == "??"


def test_no_secret_is_in_it(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    monkeypatch.setenv("PIP_INDEX_URL", "https://user:hunter2hunter2@host/simple")
    assert "hunter2" not in json.dumps(run_manifest(environment=environment("cpu")))


def test_no_program_is_started(monkeypatch, project):
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "system", refuse)
    assert run_manifest(environment=environment("cpu"))["platform"]


def test_differences():
    old = {"a": 1, "b": {"c": 1, "d": 2}, "gone": 1, "kind": {"x": 1}}
    new = {"a": 2, "b": {"c": 1, "d": 3}, "new": 1, "kind": 5}
    assert differences(old, new) == [("a", 1, 2), ("b.d", 2, 3), ("kind", {"x": 1}, 5)]
    assert differences(old, old) == differences({}, new) == []


def test_a_changed_thread_count_is_a_difference():
    threads, before = torch.get_num_threads(), environment("cpu")
    try:
        torch.set_num_threads(threads + 1)
        assert differences(before, environment("cpu")) == [("threads", threads, threads + 1)]
    finally:
        torch.set_num_threads(threads)
