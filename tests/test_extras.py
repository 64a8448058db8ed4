"""Each `pip install "codex_ml[extra]"` that a page or a message shows: the extra is there, and brings what is spoken of."""

import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Words by which pages and messages call a package.
NAMES = {"w&b": "wandb"} | {name: name for name in (
    "tensorboard", "wandb", "mlflow", "nvidia-ml-py", "polars", "jsonschema", "rich", "cryptography", "matplotlib", "torchmetrics",
    "tokenizers", "detect-secrets")}
INSTALL = re.compile(r"""pip install\s+(\\?["'])codex_ml\[([^\]]*)\]\1""")


def requirements(extra: str) -> dict[str, str]:
    """Package → version wanted, of an extra with all extras that it names."""
    found: dict[str, str] = {}
    for line in PROJECT["optional-dependencies"][extra]:
        name, more, version = re.fullmatch(r"([\w.-]+)(?:\[([\w,]+)\])?(.*)", line).groups()  # type: ignore[union-attr]
        found |= {k: v for part in more.split(",") for k, v in requirements(part).items()} if name == "codex_ml" else {name: version}
    return found


def pieces() -> dict[str, list[str]]:
    """Where somebody may read such a line: pages by their lines, with the title; in code each with two lines before and after it."""
    found = {"README.md": [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if "pip install" in line]}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        texts = found[path.relative_to(ROOT).as_posix()] = []
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        title = "".join(cells[0]["source"]).split("\n")[0] + "\n"
        for cell in cells:
            lines, head, around = "".join(cell["source"]).split("\n"), *((title, 0) if cell["cell_type"] == "markdown" else ("", 2))
            texts += [head + "\n".join(lines[max(0, i - around):i + around + 1]) for i, line in enumerate(lines) if "pip install" in line]
    return found


def amiss(name: str, text: str) -> list[str]:
    """What is wrong with the install lines in a piece of text."""
    wrong = []
    shown = [match[2] for match in INSTALL.finditer(text)]
    if len(shown) != len(re.findall(r"pip install[^`\n]{0,4}codex_ml\b", text)):
        wrong.append(f"{name}: an install line without quotes or without an extra: a shell takes the brackets for a pattern")
    brought: dict[str, str] = {}
    for extra in ",".join(shown).split(",") if shown else ():
        if extra not in PROJECT["optional-dependencies"]:
            return [*wrong, f"{name}: there is no extra {extra!r}"]
        brought |= requirements(extra)
    spoken = {package for word, package in NAMES.items() if re.search(rf"(?<![\w/.\[-]){re.escape(word)}(?![\w\]-])", text.lower())}
    if shown and not spoken & brought.keys():
        wrong.append(f"{name}: it speaks of {sorted(spoken) or 'no package'}, and codex_ml[{','.join(shown)}] brings {sorted(brought)}")
    known = brought | {re.split(r"[<>=]", line)[0]: "" for line in PROJECT["dependencies"]}
    if shown:
        for plain in re.findall(r"pip install ((?:[a-z][\w-]*[ `)]?)+)", text):
            wrong += [f"{name}: {word} is not in that extra" for word in plain.strip("`) ").split() if word not in known]
        for version in re.findall(r"\(([\d.]+) or newer", text):
            if not any(f">={version}" in wanted for wanted in brought.values()):
                wrong.append(f"{name}: {version} or newer, and pyproject.toml has {brought}")
    return wrong


def test_each_install_line_names_an_extra_that_brings_what_is_spoken_of() -> None:
    found = {name: texts for name, texts in pieces().items() if any("codex_ml" in text for text in texts)}
    assert {"nbs/guides/tensorboard_missing.ipynb", "nbs/guides/gpu_metrics_missing.ipynb", "nbs/guides/wandb_fails.ipynb"} <= found.keys()
    assert len(found) > 12  # those, and the rooms whose messages show one
    assert [w for name, texts in found.items() for text in texts for w in amiss(name, text)] == []


def test_every_extra_for_users_is_shown_somewhere() -> None:
    shown = {extra for texts in pieces().values() for text in texts for match in INSTALL.finditer(text) for extra in match[2].split(",")}
    assert PROJECT["optional-dependencies"].keys() - shown - {"all", "dev", "secrets"} == set()


@pytest.mark.parametrize("text", [
    'TensorBoard: pip install "codex_ml[tensorbord]"', 'TensorBoard: pip install "codex_ml[gpu]"', "polars: pip install codex_ml[metrics]",
    'pip install "codex_ml[gpu]"', 'TensorBoard: `pip install "codex_ml[tensorboard]"`, which is `pip install tensorbord`',
    'TensorBoard: `pip install "codex_ml[tensorboard]"` (2.20 or newer)', 'mlflow: pip install "codex_ml[mlflow,wnadb]"',
])
def test_a_wrong_install_line_is_seen(text: str) -> None:
    assert amiss("page", text)


@pytest.mark.parametrize("text", [
    'TensorBoard: `pip install "codex_ml[tensorboard]"`, which is `pip install torch tensorboard` with what works (2.21 or newer: …)',
    "raise E(\"needs polars: pip install 'codex_ml[metrics]'\")", r'"MLflow: pip install \"codex_ml[mlflow]\""', "pip install nothing",
    'everything, rich too: pip install "codex_ml[all]"',
])
def test_a_right_install_line_passes(text: str) -> None:
    assert amiss("page", text) == []
