"""The examples, run by papermill as a batch job would run them: small, with two sets of parameters each.

The kernel is the interpreter that runs the tests, whatever kernels and IPython profiles the user has.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest

from codex_ml.config import KEYS, UNDERSCORED, default_of

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "nbs/examples"
SECONDS = 120  # for each cell
SHA256 = re.compile(r"\b[0-9a-f]{64}\b")


@pytest.fixture
def kernel(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python3` is this interpreter, with no startup files, and it finds this package."""
    home = tmp_path_factory.mktemp("jupyter")
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "tests", "language": "python"}
    (home / "kernels/python3").mkdir(parents=True)
    (home / "kernels/python3/kernel.json").write_text(json.dumps(spec))
    for name, value in {"JUPYTER_PATH": home, "JUPYTER_RUNTIME_DIR": home / "run", "IPYTHONDIR": home / "ipython",
                        "OMP_NUM_THREADS": 1}.items():  # threads that wait for a core slow small models down tenfold
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))


@pytest.fixture
def poem(tmp_path: Path) -> str:
    path = tmp_path / "poem.txt"
    path.write_text("".join(f"{i} the quick brown fox jumps over the lazy dog\n" for i in range(60)))
    return str(path)


class Executed:
    """A notebook after its run; `text` is all that its code cells show."""

    def __init__(self, name: str, folder: Path, **parameters: Any):
        path = EXAMPLES / f"{name}.ipynb"
        self.parameters = papermill.inspect_notebook(str(path))
        assert parameters.keys() <= self.parameters.keys(), "papermill would only warn of a parameter that the notebook does not have"
        papermill.execute_notebook(str(path), str(folder / f"{name}.ipynb"), parameters, kernel_name="python3", cwd=str(folder),
                                   progress_bar=False, execution_timeout=SECONDS)
        self.notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
        self.code = [cell for cell in self.notebook.cells if cell.cell_type == "code"]

    @property
    def outputs(self) -> list[dict[str, Any]]:
        return [output for cell in self.code for output in cell.outputs]

    @property
    def text(self) -> str:
        return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in self.outputs)

    def shows(self, kind: str) -> int:
        return sum(kind in output.get("data", {}) for output in self.outputs)


def latest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "latest.json").read_text())


def test_the_kernel_is_this_interpreter(kernel: None, tmp_path: Path) -> None:
    code = nbformat.v4.new_code_cell("import sys, codex_ml; print(sys.executable, codex_ml.__file__)")
    nbformat.write(nbformat.v4.new_notebook(cells=[code]), tmp_path / "in.ipynb")
    papermill.execute_notebook(str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), kernel_name="python3", cwd=str(tmp_path),
                               progress_bar=False, execution_timeout=SECONDS)
    [output] = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[0].outputs
    assert output.text.split() == [sys.executable, str(ROOT / "codex_ml/__init__.py")]


# ---- train

TRAIN = [
    {"model_name": "tiny", "block_size": 16, "epochs": 2, "steps_per_epoch": 12, "learning_rate": 0.01, "threads": 1},
    {"model_name": "gpt", "model_args": {"dim": 16, "layers": 1, "heads": 2, "dropout": 0.1}, "block_size": 24, "epochs": 3,
     "steps_per_epoch": 40, "batch_size": 8, "grad_accum": 2, "grad_clip": None, "learning_rate": 0.01, "seed": None, "threads": 1,
     "scheduler_type": "linear", "scheduler_final_lr_scale": 0.3, "checkpoint_resume": True, "checkpoint_retention_keep_last": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize("parameters", TRAIN, ids=["tiny", "gpt"])
def test_train_is_the_twin_of_the_command_line(kernel: None, tmp_path: Path, poem: str, parameters: dict[str, Any]) -> None:
    executed = Executed("train", tmp_path, data=poem, checkpoint_dir="runs/a", **parameters)
    metrics = json.loads((tmp_path / "runs/a" / latest(tmp_path / "runs/a")["path"] / "metadata.json").read_text())["metrics"]
    assert latest(tmp_path / "runs/a")["epoch"] == parameters["epochs"]
    assert f"perplexity on validation: {metrics['val_perplexity']:.2f}, of a unigram model: " in executed.text
    learnt, unigram = map(float, re.findall(r"perplexity on validation: ([\d.]+), of a unigram model: ([\d.]+)", executed.text)[0])
    assert learnt < unigram
    assert executed.shows("text/html") >= 1 and executed.shows("image/png") == 1 and "def " in executed.text

    words = [f"{UNDERSCORED[name]}={command_line(value)}" for name, value in parameters.items()]
    subprocess.run([sys.executable, "-m", "codex_ml.cli.train", f"data={poem}", "checkpoint.dir=runs/b", *words], cwd=tmp_path, check=True,
                   timeout=SECONDS, capture_output=True)
    sha256 = latest(tmp_path / "runs/b")["checkpoint_sha256"]
    assert sha256 == latest(tmp_path / "runs/a")["checkpoint_sha256"] and sha256 in executed.code[-1].outputs[0].data["text/plain"]


def command_line(value: Any) -> str:
    """A value as an override has it: `null`, `true`, `{dim:16}`."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{command_line(v)}" for k, v in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def test_train_has_every_key_with_its_default() -> None:
    found = papermill.inspect_notebook(str(EXAMPLES / "train.ipynb"))
    assert [UNDERSCORED[name] for name in found] == list(KEYS)
    for name, parameter in found.items():
        assert eval(parameter["default"]) == default_of(UNDERSCORED[name]), name


@pytest.mark.slow
def test_train_leaves_room_for_settings_ini(kernel: None, tmp_path: Path, poem: str) -> None:
    (tmp_path / "settings.ini").write_text(f"[codex_ml]\nmodel_name = tiny\nblock_size = 16\nthreads = 1\ndata = {poem}\nepochs = 9\n")
    Executed("train", tmp_path, checkpoint_dir="run", epochs=1, steps_per_epoch=3)
    values = json.loads((tmp_path / "run/config.resolved.json").read_text())["values"]
    assert (values["block_size"]["value"], values["epochs"]["value"]) == (16, 1)
    assert values["block_size"]["origin"].endswith("settings.ini")


# ---- resume_after_kill

KILL = [
    {"kills": 2, "epochs": 3, "steps_per_epoch": 20, "block_size": 16, "checkpoint_every_steps": 2},
    {"kills": 3, "kill_seed": 7, "epochs": 2, "steps_per_epoch": None, "block_size": 16, "batch_size": 8, "checkpoint_every_steps": None,
     "seed": 5, "checkpoint_dir": "runs"},
]


@pytest.mark.slow
@pytest.mark.parametrize("parameters", KILL, ids=["steps", "epochs"])
def test_resume_after_kill(kernel: None, tmp_path: Path, poem: str, parameters: dict[str, Any]) -> None:
    executed = Executed("resume_after_kill", tmp_path, data=poem, **parameters)
    kills = re.findall(r"kill (\d+): signal (\d+), newest on the disk: (.+)", executed.text)
    assert kills and {signal for _, signal, _ in kills} == {"9"} and len(kills) <= parameters["kills"]
    first, second = SHA256.findall(executed.text)
    assert first == second
    if "checkpoint_dir" in parameters:
        assert latest(tmp_path / "runs/killed")["checkpoint_sha256"] == latest(tmp_path / "runs/whole")["checkpoint_sha256"] == first


# ---- bring_your_own

OWN = [
    {"epochs": 4, "threads": 1, "progress": "off"},
    {"epochs": 2, "threads": 1, "batch_size": 48, "num_workers": 2, "scheduler_type": "linear", "seed": 0, "checkpoint_dir": "mine"},
]


@pytest.mark.slow
@pytest.mark.parametrize("parameters", OWN, ids=["cosine", "workers"])
def test_bring_your_own(kernel: None, tmp_path: Path, parameters: dict[str, Any]) -> None:
    executed = Executed("bring_your_own", tmp_path, **parameters)
    runs = tmp_path / parameters.get("checkpoint_dir", "runs/bring_your_own")
    whole, resumed = latest(runs / "whole"), latest(runs / "stopped")
    assert whole["checkpoint_sha256"] == resumed["checkpoint_sha256"] in executed.text
    assert whole["epoch"] == parameters["epochs"]
    metrics = json.loads((runs / "whole" / whole["path"] / "metadata.json").read_text())["metrics"]
    assert {"train_loss", "val_loss", "accuracy", "worst_class", "weight_norm"} <= metrics.keys()
    assert metrics["accuracy"] > 0.4  # four classes
    assert executed.shows("image/png") == 2
