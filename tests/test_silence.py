"""Nothing leaves the machine: the examples run where there is no network, and a run with every sink on tries to reach nobody."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = "the quick brown fox jumps over the lazy dog\n" * 100
TRAIN = [sys.executable, "-m", "codex_ml.cli.train", "data=poem.txt", "model_name=tiny", "block_size=16", "epochs=2", "threads=1",
         "checkpoint.dir=run", "tensorboard=true", "wandb_enable=true", "mlflow_enable=true", "system_metrics_interval=0.2",
         "histogram_every_steps=50", "monitoring.alerts.nan=true", "monitoring.system_metrics.extended=true"]
# brings up the loopback interface of a new namespace, over which a notebook talks to its kernel, and becomes the command
ALONE = """
import fcntl, os, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", 1))
os.execvp(sys.argv[1], sys.argv[1:])
"""
pytestmark = pytest.mark.slow


def environment():
    "Without what would tell a library to be silent: it has to be so by itself."
    return {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "MLFLOW_", "DO_NOT_TRACK", "HTTP", "http"))}


@pytest.fixture(scope="module")
def alone():
    "A command that runs another one in an empty network namespace."
    words = ["unshare", *([] if os.geteuid() == 0 else ["-r"]), "-n", "--", sys.executable, "-c", ALONE]
    tried = subprocess.run([*words, "true"], capture_output=True, text=True) if shutil.which("unshare") else None
    if tried is None or tried.returncode:
        pytest.skip(f"no network namespace can be made here: {tried.stderr.strip() if tried else 'unshare is not installed'}")
    return words


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "nbs" / "examples").glob("*.ipynb")))
def test_an_example_without_a_network(alone, tmp_path, name):
    small = ["-p", "epochs", "1", "-p", "steps_per_epoch", "20", "-p", "model_name", "tiny"] if name == "train" else []
    words = [sys.executable, "-m", "papermill", "--no-progress-bar", *small, ROOT / "nbs" / "examples" / f"{name}.ipynb", "out.ipynb"]
    done = subprocess.run([*alone, *words], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_sink_without_a_network(alone, tmp_path):
    (tmp_path / "poem.txt").write_text(TEXT)
    done = subprocess.run([*alone, *TRAIN], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


def spoken_to(trace):
    "Addresses, other than those of this machine, that a trace shows an attempt to reach, and questions to name servers."
    calls = re.findall(r"^.*(?:connect|sendto|sendmsg|sendmmsg)\(.*$", trace, re.MULTILINE)
    other = [c for c in calls if re.search(r"AF_INET6?\b", c) and not re.search(r'"127\.|"::1"', c)]
    return other + [c for c in calls if re.search(r"htons\((53|853|5353)\)|systemd/resolve", c) and c not in other]


def test_a_trace_shows_what_it_should():
    assert spoken_to('12 connect(5, {sa_family=AF_INET, sin_port=htons(443), sin_addr=inet_addr("10.1.2.3")}, 16) = 0')
    assert spoken_to('12 connect(5, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("127.0.0.53")}, 16) = 0')
    assert not spoken_to('12 connect(5, {sa_family=AF_INET, sin_port=htons(4001), sin_addr=inet_addr("127.0.0.1")}, 16) = 0')
    assert not spoken_to('12 connect(5, {sa_family=AF_UNIX, sun_path="/tmp/wandb-1"}, 110) = 0')


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_every_sink_tries_to_reach_nobody(tmp_path):
    (tmp_path / "poem.txt").write_text(TEXT)
    trace = tmp_path / "trace"
    words = ["strace", "-f", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-s", "200", "-o", trace]
    try:
        allowed = subprocess.run([*words, "true"], capture_output=True, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        allowed = False
    if not allowed:
        pytest.skip("processes cannot be traced here")
    # the run, and after it whatever else reads it or writes it somewhere
    after = [["export", "run", "--to", to, "--check"] for to in ("tensorboard", "wandb", "mlflow", "csv", "parquet")]
    after += [["evaluate", "run", "bootstrap=20", "max_steps=2"], ["compare", "run", "run", "--dest", "page.html"]]
    after += [["watch", "run", "--once"]]
    code = f"import sys; from codex_ml.cli.main import main; sys.exit(sum(main(words) for words in {after!r}))"
    both = f"{shlex.join(TRAIN)} && {shlex.join([sys.executable, '-c', code])}"
    done = subprocess.run([*words, "sh", "-c", both], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "wandb").exists() and list(tmp_path.glob("run/tensorboard/events*"))
    assert spoken_to(trace.read_text(errors="replace")) == []
