"""The command line as its users meet it: the documented examples, slips, interrupts, a second terminal."""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from commands import Shell

TEXT = "".join(f"{i} times {i % 7} is {i * (i % 7)}\n" for i in range(2000))
TINY = ("data=text.txt", "model_name=tiny", "block_size=16", "batch_size=4", "checkpoint.dir=run", "eval_steps=2", "threads=1")
SMALL = "[codex_ml]\nsteps_per_epoch = 3\neval_steps = 1\nmodel_args.dim = 32\nmodel_args.layers = 1\nbatch_size = 4\n"


@pytest.fixture(scope="module")
def shell():
    with Shell() as shell:
        yield shell


@pytest.fixture
def work(tmp_path):
    """A working folder with a text, and a settings.ini of its own, so that none above it counts."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "text.txt").write_text(TEXT)
    (folder / "settings.ini").write_text("[codex_ml]\n")
    return folder


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def printed_hash(out):
    return re.search(r"^checkpoint_sha256 +([0-9a-f]{64})$", out, re.MULTILINE)[1]


def pointer(work, run="run"):
    return json.loads((work / run / "latest.json").read_text())


# ---- the documented examples, as they are written

COMMAND = r"""
python -m codex_ml.cli.train epochs=5 checkpoint.dir=artifacts/ck \
  checkpoint.resume=true scheduler.type=linear scheduler.final_lr_scale=0.3 \
  reproducibility.cudnn_deterministic=true \
  checkpoint.retention.keep_last=2
"""
PROGRAM = """
from codex_ml.train_loop import run_training

result = run_training(
    epochs=4,
    checkpoint_dir="ck",
    run_config={"epochs": 4, "model_name": "Tiny"},
    retention_policy={"keep_last": 2},
    deterministic_cudnn=True,
)
print(result["checkpoint_sha256_last"])
"""


def test_the_documented_command(work):
    """In a process of its own; all hashes are that of the file."""
    (work / "settings.ini").write_text(SMALL)
    words = shlex.split(COMMAND.replace("\\\n", " "))
    done = subprocess.run([sys.executable, *words[1:]], cwd=work, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    run = work / "artifacts" / "ck"
    epochs = sorted(p.name for p in run.glob("epoch-*"))
    assert epochs[-2:] == ["epoch-0004", "epoch-0005"] and len(epochs) <= 3
    sha = hashlib.sha256((run / "epoch-0005" / "checkpoint.pt").read_bytes()).hexdigest()
    metadata = json.loads((run / "epoch-0005" / "metadata.json").read_text())
    assert sha == printed_hash(done.stdout) == pointer(work, "artifacts/ck")["checkpoint_sha256"] == metadata["checkpoint_sha256"]
    assert [round(rate, 7) for rate in metadata["current_lrs"]] == [0.0003] and metadata["scheduler_type"] == "linear"
    for word in ("loss", "perplexity", "a unigram model", "a sample of what it learnt", "artifacts/ck/epoch-0005"):
        assert word in done.stdout


def test_the_documented_program(shell, work):
    (work / "settings.ini").write_text("[codex_ml]\nsteps_per_epoch = 3\neval_steps = 1\n")
    code, out, err = shell.run(work, script=PROGRAM)
    assert code == 0, err
    assert out.split()[-1] == pointer(work, "ck")["checkpoint_sha256"]
    assert json.loads((work / "ck" / "config.snapshot.json").read_text()) == {"epochs": 4, "model_name": "Tiny"}
    values = json.loads((work / "ck" / "config.resolved.json").read_text())["values"]
    assert values["model_name"] == {"value": "Tiny", "origin": "run_config"}


# ---- slips

SLIPS = {
    "epoch=5": "did you mean 'epochs'?", "checkpoint.retention.keep_lst=2": "did you mean 'checkpoint.retention.keep_last'?",
    "lr=0.1": "did you mean 'learning_rate'?", "epochs=five": "a whole number", "epochs=2.5": "a whole number", "epochs=-1": "from 0 on",
    "epochs=true": "a whole number", "batch_size=0": "above 0", "learning_rate=nan": "a number", "learning_rate=fast": "a number",
    "checkpoint.resume=maybe": "true or false", "on_nan=explode": "error, warn, ignore", "progress=fancy": "auto, live, lines, off",
    "seed=4294967296": "4294967295", "seed=x": "a whole number", "checkpoint.retention.keep_last=0": "above 0", "epochs": "key=value",
    "checkpoint.dir=''": "a path", "+epochs=3": "epochs=3", "~epochs": "epochs", "epochs=1,2": "a sweep",
    "scheduler=linear": "scheduler.type",
    "=5": "", "epochs=": "a whole number", "model_args=5": "key-value pairs", "eval_fraction=1": "below 1", "threads=0": "above 0",
    "model_name=tinny": "did you mean 'tiny'?",
    "optimizer=adamx": "did you mean 'adam'?", "scheduler.type=liniar": "did you mean 'linear'?",
    "tokenizer=bite": "did you mean 'byte'?", "data=no/such/file.txt": "no/such/file.txt", "model_args.dimm=3": "dim",
    "optimizer_args.betta=3": "betta", "device=tpu": "auto, cpu, cuda", "device=cuda:99": "device=cpu", "block_size=100000": "block_size",
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_one_line_and_writes_nothing(shell, work, slip):
    before = listing(work)
    code, out, err = shell.run(work, *TINY, "epochs=1", slip)
    assert code == 2 and out == "", err
    assert err.startswith("codex_ml: ") and err.count("\n") == 1 and SLIPS[slip] in err
    assert listing(work) == before


@pytest.mark.parametrize(("line", "hint"), (
    ("epoch = 3", "did you mean 'epochs'?"), ("epochs = three", "a whole number"), ("epochs", "settings.ini"),
    ("epochs = 1\nepochs = 2", "settings.ini"), ("scheduler.type = liniar", "'linear'")))
def test_a_slip_in_settings_ini(shell, work, line, hint):
    (work / "settings.ini").write_text(f"[codex_ml]\n{line}\n")
    before = listing(work)
    code, _, err = shell.run(work, *TINY)
    assert code == 2 and err.count("\n") == 1 and hint in err
    assert listing(work) == before


def test_a_slip_costs_no_torch(work):
    script = """
        import sys
        import codex_ml
        assert "torch" not in sys.modules and "numpy" not in sys.modules
        from codex_ml.cli.train import main
        assert main(["epoch=5"]) == 2 and main(["epochs=x"]) == 2 and main(["--help"]) == 0
        assert "torch" not in sys.modules, "torch was imported for a slip"
        codex_ml.run_training
        assert "torch" in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=work, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 2 and "checkpoint.retention.keep_last" in done.stdout


def test_help_writes_nothing(shell, work):
    before = listing(work)
    code, out, err = shell.run(work, "epochs=3", "--help")
    assert code == 0 and err == "" and "  epochs " in out and "python -m codex_ml.cli.train" in out and listing(work) == before


# ---- settings.ini


def test_precedence_and_origins(shell, work):
    (work / "settings.ini").write_text("[codex_ml]\nepochs = 2\nlearning_rate = 0.5\nbatch_size = 8\n")
    inner = work / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "text.txt").write_text(TEXT)
    code, _, err = shell.run(inner, *TINY, "epochs=1", "steps_per_epoch=2")
    assert code == 0, err
    values = json.loads((inner / "run" / "config.resolved.json").read_text())["values"]
    assert values["epochs"] == {"value": 1, "origin": "override"} and values["batch_size"] == {"value": 4, "origin": "override"}
    assert values["learning_rate"] == {"value": 0.5, "origin": str((work / "settings.ini").resolve())}
    assert values["seed"] == {"value": 1234, "origin": "default"}


# ---- interrupts


@pytest.fixture(scope="module")
def expected(shell, tmp_path_factory):
    """The hash of the run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("expected") / "work"
    folder.mkdir()
    (folder / "text.txt").write_text(TEXT)
    (folder / "settings.ini").write_text("[codex_ml]\n")
    code, out, err = shell.run(folder, *TINY, *LONG)
    assert code == 0, err
    return printed_hash(out)


LONG = ("epochs=3", "steps_per_epoch=250", "checkpoint.every_steps=100")


def start(shell, work, *words):
    """A run that is under way: its first checkpoint is there."""
    command = shell.start(work, *TINY, *LONG, *words)
    command.until(work / "run" / "latest.json")
    return command


@pytest.mark.parametrize(("number", "code"), ((signal.SIGINT, 130), (signal.SIGTERM, 143)))
def test_an_interrupted_command_says_how_to_go_on_and_ends_alike(shell, work, expected, number, code):
    command = start(shell, work)
    command.signal(number)
    assert command.wait() == code
    assert signal.Signals(number).name in command.stderr and "Traceback" not in command.stderr
    assert pointer(work)["path"].startswith("step-") and 100 <= pointer(work)["global_step"] < 750
    words = [*TINY, *LONG, "checkpoint.resume=true"]
    if number == signal.SIGINT:
        hint = re.search(r"to go on: \S+ -m codex_ml.cli.train (.*)$", command.stdout, re.MULTILINE)[1]
        assert shlex.split(hint) == words
    code, out, err = shell.run(work, *words)
    assert code == 0 and printed_hash(out) == expected, err
    assert not list((work / "run").glob("step-*"))
    code, out, err = shell.run(work, *words)  # once more: there is nothing to do
    assert code == 0 and printed_hash(out) == expected


def test_two_interrupts_stop_at_once(shell, work, expected):
    command = start(shell, work)
    os.kill(command.pid, signal.SIGSTOP)  # so that both are there before it runs on
    command.signal()
    command.signal(signal.SIGTERM)
    os.kill(command.pid, signal.SIGCONT)
    assert command.wait() in (130, 143) and "Traceback" not in command.stderr
    assert pointer(work)["global_step"] % 50 == 0  # what was due, and no checkpoint on the way out
    code, out, _ = shell.run(work, *TINY, *LONG, "checkpoint.resume=true")
    assert code == 0 and printed_hash(out) == expected


def test_an_interrupt_in_the_first_moments_is_no_traceback(work):
    """While torch is imported: nothing is there to save, and nothing to explain."""
    command = [sys.executable, "-m", "codex_ml.cli.train", *TINY, *LONG]
    for delay in (0.6, 1.2):
        process = subprocess.Popen(command, cwd=work, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        limit = time.monotonic() + 20
        while "hydra" not in open(f"/proc/{process.pid}/maps").read() and "libtorch" not in open(f"/proc/{process.pid}/maps").read():
            assert time.monotonic() < limit
            time.sleep(0.01)
        time.sleep(delay - 0.6)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in err, err


def test_an_interrupt_that_an_import_made_another_error_of(monkeypatch, capsys):
    """Lazy imports catch what they like, and leave half a module behind: the next line fails, and says nothing of an interrupt."""
    from codex_ml.cli.train import main
    from codex_ml.optimizers import OptimizerError

    def half_imported(*_):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except BaseException:
            raise OptimizerError("maximum recursion depth exceeded") from None

    monkeypatch.setattr("codex_ml.train_loop.train", half_imported)
    before = signal.getsignal(signal.SIGINT)
    assert main(["epochs=1"]) == 130 and signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err == "\nstopped at once; the last checkpoint is kept\n"


def test_an_interrupt_of_a_run_that_keeps_nothing(shell, work):
    words = [word for word in TINY if not word.startswith("checkpoint.dir")]
    command = shell.start(work, *words, *LONG, "log_every_steps=1")
    command.until(work / ".codex" / "metrics.ndjson")
    command.signal()
    assert command.wait() == 130 and "nothing was kept" in command.stdout
    assert "checkpoint.dir" in command.stderr  # which would have kept it


WORKERS = """
import sys
import torch
from torch.utils.data import Dataset
from codex_ml.train_loop import run_training

class Noisy(Dataset):
    def __len__(self): return 4000
    def __getitem__(self, i): return torch.randn(8) + i % 3, i % 3

result = run_training(model=lambda: torch.nn.Linear(8, 3), data=Noisy(), epochs=2, batch_size=8, num_workers=2, checkpoint_dir="run",
                      resume=True, threads=1, checkpoint_every_steps=50, progress="lines")
print(result["status"], result["checkpoint_sha256_last"])
"""


def test_an_interrupt_that_the_loader_workers_get_too(shell, work):
    """Ctrl-C goes to the whole process group."""
    (work / "whole").mkdir()
    _, whole, _ = shell.run(work / "whole", script=WORKERS)
    for number, code in ((signal.SIGINT, 0), (signal.SIGTERM, 143)):
        command = shell.start(work, script=WORKERS)
        limit = time.monotonic() + 30
        before = pointer(work)["global_step"] if (work / "run" / "latest.json").exists() else 0
        while not (work / "run" / "latest.json").exists() or pointer(work)["global_step"] <= before:
            assert time.monotonic() < limit, command.stderr
            time.sleep(0.002)
        command.signal(number)
        assert command.wait() == code and "Traceback" not in command.stderr, command.stderr
        assert pointer(work)["path"].startswith("step-")
        if number == signal.SIGINT:
            assert command.stdout.startswith("interrupted ")
    _, out, err = shell.run(work, script=WORKERS)
    assert out == whole and out.startswith("completed "), err


def test_a_second_terminal(shell, work, expected):
    first = start(shell, work)
    code, out, err = shell.run(work, *TINY, *LONG, "checkpoint.resume=true")
    assert code == 3 and out == "" and err.count("\n") == 1 and f"pid {first.pid}" in err
    assert first.wait() == 0 and printed_hash(first.stdout) == expected  # it was not disturbed


def test_a_second_terminal_after_a_kill(shell, work, expected):
    first = start(shell, work)
    first.signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    code, out, _ = shell.run(work, *TINY, *LONG, "checkpoint.resume=true")
    assert code == 0 and printed_hash(out) == expected


# ---- other exit codes


def test_drift_is_exit_code_4_with_a_table(shell, work):
    assert shell.run(work, *TINY, "epochs=1", "steps_per_epoch=2")[0] == 0
    code, _, err = shell.run(work, *TINY, "epochs=2", "steps_per_epoch=2", "learning_rate=0.1", "checkpoint.resume=true")
    assert code == 4 and "learning_rate  0.001" in err and "checkpoint.allow_drift=true" in err and "Traceback" not in err


def test_a_broken_checkpoint_with_strict_is_exit_code_4(shell, work):
    words = (*TINY, "epochs=2", "steps_per_epoch=2", "checkpoint.resume=true")
    assert shell.run(work, *words)[0] == 0
    (work / "run" / "epoch-0002" / "checkpoint.pt").write_bytes(b"x")
    code, _, err = shell.run(work, *words, "checkpoint.strict=true")
    assert code == 4 and err.count("\n") == 1 and "checkpoint.strict=false" in err
    code, _, err = shell.run(work, *words)
    assert code == 0 and "SHA-256" in err  # it is told on the terminal too


def test_a_folder_that_cannot_be_is_exit_code_5(shell, work):
    (work / "run").write_text("a file")
    code, _, err = shell.run(work, *TINY, "epochs=1")
    assert code == 5 and err.count("\n") == 1 and "checkpoint.dir" in err


def test_nan_is_exit_code_7(shell, work):
    code, _, err = shell.run(work, *TINY, "epochs=3", "steps_per_epoch=20", "learning_rate=1e30", "optimizer=sgd")
    assert code == 7 and "Traceback" not in err and "on_nan=warn" in err


FULL = """
import os, subprocess, sys
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=SIZE", "tmpfs", "run"]).returncode: sys.exit(77)
from codex_ml.cli.train import main
code = main(sys.argv[1:])
print(sorted(os.listdir("run")))
sys.exit(code)
"""


@pytest.mark.parametrize(("size", "words"), (("100k", "needs about"), ("0", ""), ("2500k", "cannot write")))
def test_a_full_disk_is_exit_code_5(work, size, words):
    (work / "run").mkdir()
    script = FULL.replace("SIZE", size if size != "0" else "4k")
    try:
        done = subprocess.run(["unshare", "-rm", sys.executable, "-c", script, *TINY, "epochs=30", "steps_per_epoch=1"], cwd=work,
                              capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no `unshare` here to mount a small disk with")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"this system lets nobody mount a small disk: {done.stderr.strip()}")
    assert done.returncode == 5 and "Traceback" not in done.stderr and "codex_ml: " in done.stderr and words in done.stderr, done.stderr
    assert ".tmp" not in done.stdout
    assert ("epoch-0001" in done.stdout) == (size == "2500k")
