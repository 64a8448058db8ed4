"""Files as corpora: hostile folders, broken lines, and an order that no disk decides."""

import json
import os
import random
import subprocess
import sys
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codex_ml import corpus as module
from codex_ml.corpus import hold_out, read_corpus, stdlib
from codex_ml.data import DataError


@pytest.fixture
def folder(tmp_path):
    files = {"b.txt": "b", "a/z.txt": "z", "a.txt": "a", "a/y/x.md": "x", ".hidden.txt": "no", ".git/config": "no", "a/.c": "no"}
    for name in random.sample(sorted(files), len(files)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(files[name])
    return tmp_path


def test_a_folder_in_the_order_of_its_names_without_hidden_files(folder):
    assert read_corpus(str(folder)).train == ["a", "x", "z", "b"]  # "a.txt" < "a/y/x.md" < "a/z.txt" < "b.txt"


@pytest.mark.parametrize(("pattern", "found"), [
    ("*.txt", "ab"), ("**/*.txt", "azb"), ("**", "axzb"), ("a/**", "xz"), ("?.txt", "ab"), ("[b-z].txt", "b"), ("*/y/*", "x")])
def test_patterns(folder, pattern, found):
    assert read_corpus(f"{folder}/{pattern}").train == list(found)


def test_a_pattern_that_names_a_hidden_part_gets_it(folder):
    assert read_corpus(f"{folder}/.hid*").train == ["no"]
    assert read_corpus(f"{folder}/a/.*").train == ["no"]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("brackets")
    (tmp_path / "a1.txt").write_text("pattern")
    assert read_corpus(str(tmp_path / "a[1].txt")).train == ["brackets"]


def test_relative_paths_and_home(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    assert read_corpus("*.txt").train == read_corpus("./*.txt").train == read_corpus("~/*.txt").train == ["a", "b"]
    assert read_corpus("~/a").train == ["x", "z"]


def test_links_pipes_and_circles_in_a_folder_are_left_alone(folder):
    os.mkfifo(folder / "pipe.txt")
    (folder / "circle").symlink_to(folder)
    (folder / "a" / "circle2").symlink_to(folder)
    (folder / "linked.txt").symlink_to(folder / "b.txt")
    assert read_corpus(str(folder)).train == ["a", "x", "z", "b"]
    assert read_corpus(f"{folder}/**/*.md").train == ["x"]
    assert read_corpus(str(folder / "linked.txt")).train == ["b"]  # asked for by name


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/stdin"):
        with pytest.raises(DataError, match="not a regular file"):
            read_corpus(str(path))


def test_folders_deeper_than_the_stack(tmp_path, monkeypatch):
    (tmp_path / "top.txt").write_text("top")
    monkeypatch.chdir(tmp_path)
    depth = 1200
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    try:
        assert read_corpus(str(tmp_path)).train == ["top"]
    finally:  # pytest's own removal recurses
        for _ in range(depth):
            os.chdir("..")
            os.rmdir("d")


def test_other_files_are_counted_once_and_a_folder_of_nothing_else_is_refused(folder):
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "late.bin").write_bytes(b"x" * 10_000 + b"\0")
    with pytest.warns(UserWarning, match=r"3 of 7 files .*image.png and others") as seen:
        assert read_corpus(str(folder)).train == ["a", "x", "z", "b"]
    assert len(seen) == 1
    with pytest.raises(DataError, match=r"latin.txt is not UTF-8 text: load it yourself"):
        read_corpus(str(folder / "latin.txt"))
    with warnings.catch_warnings(), pytest.raises(DataError, match="is not UTF-8 text"):
        warnings.simplefilter("error")
        read_corpus(f"{folder}/*.png")


@pytest.mark.parametrize("where", ["", "\0", "no/such/place", "x" * 5000, "/" + "y/" * 3000, "a\0*", "nothing*here", "a**b",
                                   "~nobody-has-this-name/x"])
def test_paths_that_lead_nowhere_are_short_errors(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        read_corpus(where)
    assert len(str(error.value)) < 500


def test_the_nearest_neighbour_is_named_even_above_the_mistake(folder):
    with pytest.raises(DataError, match="did you mean 'b.txt'"):
        read_corpus(str(folder / "bb.txt"))
    (folder / "corpora").mkdir()
    with pytest.raises(DataError, match="did you mean 'corpora'"):
        read_corpus(str(folder / "corpra" / "deep" / "file.txt"))


def test_empty_files_and_folders(tmp_path):
    with pytest.raises(DataError, match="holds no text: 0 files"):
        read_corpus(str(tmp_path))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="holds no text: 1 file"):
        read_corpus(str(tmp_path))


def test_line_ends_and_marks_stay_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa\r\nb\rc\n".encode())
    assert read_corpus(str(tmp_path / "a.txt")).train == ["\ufeffa\r\nb\rc\n"]


def test_an_unreadable_file_is_named(folder, monkeypatch):
    def broken(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(module, "_text", broken)
    with pytest.raises(DataError, match=r"cannot be read.*Permission denied.*a\.txt"):
        read_corpus(str(folder))


def lines(tmp_path, *records):
    path = tmp_path / "tales.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records))
    return str(path)


def test_json_lines(tmp_path):
    where = lines(tmp_path, {"text": "one\u2028still one\x85"}, "", {"text": "", "n": 1}, {"text": "two\n"})
    assert read_corpus(where).train == ["one\u2028still one\x85", "", "two\n"]
    assert read_corpus(str(tmp_path)).train == read_corpus(f"{tmp_path}/*.jsonl").train == read_corpus(where).train
    (tmp_path / "notes.txt").write_text("notes")
    assert len(read_corpus(str(tmp_path)).train) == 2  # among other files it is a document like them
    assert read_corpus(lines(tmp_path, {"body": "b"}), "body").train == ["b"]


@pytest.mark.parametrize(("line", "said"), [
    ("{", "Expecting"), ("[1]", "a list where an object"), ('{"txt": "a"}', r"did you mean text_field=txt\? The fields are txt"),
    ("{}", "The fields are none"), ('{"text": 3}', "holds a int, not text"), ('{"text": null}', "NoneType"),
    ('{"text": "\\ud800"}', "surrogates"), ("[" * 100_000, "recursion")])
def test_a_broken_line_is_named_by_file_and_number(tmp_path, line, said):
    with pytest.raises(DataError, match=f"tales.jsonl, line 2: .*{said}"):
        read_corpus(lines(tmp_path, {"text": "fine"}, line))


def test_json_lines_that_are_not_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match="a.jsonl is not UTF-8 text"):
        read_corpus(str(tmp_path / "a.jsonl"))


def test_the_default_corpus_takes_no_tests_no_packages_and_no_links(tmp_path, monkeypatch):
    for name in ("os.py", "json/tool.py", "test/a.py", "json/tests/b.py", "idlelib/idle_test/c.py", "__pycache__/d.py",
                 "site-packages/e.py", "dist-packages/f.py", "data.txt", "xtest/g.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "link.py").symlink_to("os.py")
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    assert stdlib().train == ["# json/tool.py\n", "# os.py\n", "# xtest/g.py\n"]
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path / "test" / "none"))
    with pytest.raises(DataError, match="came without its library's source"):
        stdlib()


@given(n=st.integers(1, 300), fraction=st.floats(0, 0.95))
def test_holding_out_loses_nothing_and_holds_its_share(n, fraction):
    documents = [f"{i}\n" for i in range(n)]
    train, valid = hold_out(documents, fraction)
    if fraction == 0:
        assert (train, valid) == (documents, None)
    elif n * fraction < 2:
        assert valid and len(train) == len(valid) == 1 and train[0] + valid[0] == "\n".join(documents)
    else:
        assert sorted(train + valid) == sorted(documents) and abs(len(valid) - n * fraction) <= 1


def test_every_tenth_document_is_held_out_and_bad_fractions_are_refused():
    assert hold_out(list("abcdefghijklmnopqrstuvwxyz"), 0.1)[1] == ["j", "t"]
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(DataError, match="eval_fraction"):
            hold_out(["a"], fraction)


def test_importing_it_reads_nothing():
    code = "import sysconfig; sysconfig.get_path = None\nimport codex_ml.corpus"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
