"""Slips at every command line of the project, and the form of a file by its ending."""

import ast
from pathlib import Path

import pytest

from codex_ml.cli.main import main as codex_ml
from codex_ml.cli.ndjson import main as codex_ndjson
from codex_ml.telemetry.mlflow_ui import main as mlflow_ui
from codex_ml.words import Parser, choose_form

PACKAGE = Path(__file__).resolve().parent.parent / "codex_ml"


@pytest.mark.parametrize(("main", "words", "said"), [
    (codex_ml, "export RUN --to tensorbord", "codex-ml export: there is no --to 'tensorbord': did you mean 'tensorboard'?"),
    (codex_ml, "verfy RUN", "codex-ml: there is no command 'verfy': did you mean 'verify'?"),
    (codex_ml, "tarin epochs=3", "codex-ml: there is no command 'tarin': did you mean 'train'?"),
    (codex_ml, "keys trsut a.pem", "codex-ml keys: there is no command 'trsut': did you mean 'trust'?"),
    (codex_ml, "compare a b --output htlm", "codex-ml compare: there is no --output 'htlm': did you mean 'html'?"),
    (codex_ml, "replay RUN --signature requird", "codex-ml replay: there is no --signature 'requird': did you mean 'required'?"),
    (codex_ml, "diff a b --signature wran", "codex-ml diff: there is no --signature 'wran': did you mean 'warn'?"),
    (codex_ml, "export RUN --to qqq", "codex-ml export: there is no --to 'qqq'; there are tensorboard, wandb, mlflow, csv, parquet"),
    (codex_ndjson, "summarise --input a", "codex-ndjson: there is no command 'summarise': did you mean 'summarize'?"),
    (codex_ndjson, "summarize --input a --output parqet",
     "codex-ndjson summarize: there is no --output 'parqet': did you mean 'parquet'?"),
    (mlflow_ui, "smok", "python -m codex_ml.telemetry.mlflow_ui: there is no what 'smok': did you mean 'smoke'?"),
])
def test_a_slip_is_answered_with_the_nearest_word_in_one_line(main, words, said, capsys) -> None:
    try:
        code = main(words.split())
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    assert (code, out, err) == (2, "", said + "\n")


def test_a_slip_shows_no_secret(capsys) -> None:
    assert codex_ml(["hf_" + "a1B2" * 9]) == 2
    assert "a1B2a1B2" not in capsys.readouterr().err


def test_every_parser_is_this_one() -> None:
    made = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "ArgumentParser":
                made.append(path.name)
    assert made == []


def test_words_that_are_right_pass() -> None:
    parser = Parser("x")
    parser.add_argument("what", nargs="?", choices=("a", "b"), default="a")
    parser.add_argument("-n", type=int, choices=(1, 2))
    assert vars(parser.parse_args(["b", "-n", "2"])) == {"what": "b", "n": 2} and parser.parse_args([]).what == "a"
    with pytest.raises(SystemExit):
        parser.parse_args(["-n", "3"])


FORMS = {"table": (".txt", ".md"), "csv": (".csv",), "parquet": (".parquet",)}


@pytest.mark.parametrize(("output", "dest", "form"), [
    (None, None, "table"), ("csv", None, "csv"), (None, "a.csv", "csv"), (None, "a.CSV", "csv"), (None, Path("b.md"), "table"),
    ("csv", "a.csv", "csv"), ("csv", "scores.dat", "csv"), ("csv", "scores", "csv"), (None, "a.csv.txt", "table"),
])
def test_the_ending_or_the_option_says_the_form(output, dest, form) -> None:
    assert choose_form(output, dest, FORMS) == form


@pytest.mark.parametrize(("output", "dest", "said"), [
    ("csv", "a.parquet", "a.parquet: its ending stands for parquet, and --output says csv"),
    (None, "a.dat", r"a.dat: .* can be .txt \(table\), .md \(table\), .csv \(csv\), .parquet \(parquet\); or say it with --output"),
    (None, "folder/report", "its ending does not say"), (None, ".csv", "its ending does not say"),
    ("cvs", "a.csv", "did you mean 'csv'"), ("zzz", None, "one of table, csv, parquet"),
])
def test_a_contradiction_and_an_unknown_ending_are_told(output, dest, said) -> None:
    with pytest.raises(ValueError, match=said):
        choose_form(output, dest, FORMS)
