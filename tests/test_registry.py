"""Names, plugins and hints: what happens when two want one name, and when a plugin is broken."""

import subprocess
import sys

import pytest

from codex_ml import registry
from codex_ml.registry import PluginError, UnknownName, describe, get, names, nearest, register


@pytest.fixture(autouse=True)
def clean_entries(monkeypatch):
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def plugin(folder, name, points, monkeypatch, module=""):
    "A distribution as pip leaves it: metadata, entry points, and perhaps a module."
    info = folder / f"{name}-1.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[codex_ml.rewards]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
    if module:
        (folder / f"{name}.py").write_text(module)
    monkeypatch.syspath_prepend(str(folder))


def test_importing_the_registry_loads_no_torch_and_no_numpy():
    code = "import sys, codex_ml.registry; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_plugin_is_found_in_any_case_and_described_without_being_imported(tmp_path, monkeypatch):
    plugin(tmp_path, "acme", {"Length": "acme:length"}, monkeypatch, "def length(text): return len(text)\n")
    assert "length" in names("rewards")
    assert describe("rewards", "LENGTH") == {"kind": "rewards", "name": "length", "target": "acme:length",
                                             "distribution": "acme", "version": "1.5", "source": "entry point"}
    assert "acme" not in sys.modules
    assert get("rewards", "length")("four") == 4
    sys.modules.pop("acme")


@pytest.mark.parametrize("module", ["raise OSError('no GPU here')", "length = ((", "other = 1", ""])
def test_a_broken_plugin_names_its_distribution_and_hurts_nobody_else(tmp_path, monkeypatch, module):
    plugin(tmp_path, "brokenacme", {"length": "brokenacme:length"}, monkeypatch, module)
    register("rewards", "brevity", len)
    assert get("rewards", "brevity") is len and "length" in names("rewards")
    with pytest.raises(PluginError, match="brokenacme:length of brokenacme"):
        get("rewards", "length")
    sys.modules.pop("brokenacme", None)


def test_two_distributions_that_announce_one_name_are_both_named(tmp_path, monkeypatch):
    plugin(tmp_path / "a", "acme_one", {"length": "acme_one:f"}, monkeypatch)
    plugin(tmp_path / "b", "acme_two", {"LENGTH": "acme_two:f"}, monkeypatch)
    with pytest.raises(PluginError, match="acme_one.*acme_two"):
        get("rewards", "length")


def test_a_registered_name_comes_before_an_announced_one(tmp_path, monkeypatch):
    plugin(tmp_path, "acme3", {"length": "acme3:f"}, monkeypatch)
    register("rewards", "length", len)
    assert get("rewards", "length") is len and names("rewards").count("length") == 1


def test_a_taken_name_names_both_and_override_takes_it():
    register("rewards", "size", len)
    register("rewards", "Size", len)
    with pytest.raises(ValueError, match="builtins:len, and builtins:max"):
        register("rewards", "SIZE", max)
    assert get("rewards", "size") is len
    register("rewards", "size", max, override=True)
    assert get("rewards", "size") is max


def test_a_cell_that_runs_again_replaces_and_a_lambda_does_not():
    def define(value):
        def reward(_):
            return value
        return reward

    register("rewards", "again", define(1))
    register("rewards", "again", define(2))
    assert get("rewards", "again")(None) == 2
    register("rewards", "small", lambda text: 1)
    with pytest.raises(ValueError, match="override=True"):
        register("rewards", "small", lambda text: 2)


def test_nobody_takes_a_built_in_name_by_coming_first():
    code = "from codex_ml.registry import register\nregister('schedulers', 'linear', print)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "codex_ml.schedules:linear, and builtins:print" in done.stderr


@pytest.mark.parametrize("name", ["", " ", "a b", "../x", "a:b", "épée", "x\n"])
def test_malformed_names(name):
    with pytest.raises(ValueError):
        register("rewards", name, len)


def test_unknown_kind_and_name_say_what_there_is():
    with pytest.raises(UnknownName, match="did you mean 'optimizers'"):
        names("optimisers")
    register("rewards", "length", len)
    with pytest.raises(UnknownName, match="did you mean 'length'. Known are length"):
        get("rewards", "lenght")


def test_nearest_is_bounded_stable_and_honest():
    assert nearest("x" * 1_000_000, ["xx"]) is None
    assert nearest("anything", []) is None and nearest("", ["a", "b"]) is None
    assert nearest("ad", ["adam", "adem"]) == "adam"
    assert nearest("checkpoint.zzz", ["checkpoint.dir", "checkpoint.resume"]) is None
    assert nearest("gtp", ["mlp", "gpt"]) == "gpt"
