"""Signatures: what they cover, what they notice, what a run makes of them, and what other tools say of them."""

import base64
import json
import logging
import os
import shlex
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from runs import train

from codex_ml import checkpoint as checkpoint_module
from codex_ml.checkpoint import Checkpoint, CheckpointError, list_checkpoints, save_checkpoint
from codex_ml.cli.main import main
from codex_ml.config import CheckpointConfig
from codex_ml.durable import CorruptFile, StorageError
from codex_ml.evaluate_run import evaluate_run
from codex_ml.first_difference import first_difference
from codex_ml.integrity import verify_run
from codex_ml.keys import PASSWORD, PrivateKey, PublicKey, SigningError, load_private, load_public, new_key, trust, trusted_keys
from codex_ml.replay import replay
from codex_ml.signing import (
    COVERED,
    PAYLOAD_TYPE,
    SIGNATURE,
    SignatureError,
    check_parent,
    check_signature,
    open_policy,
    open_signing,
    pae,
    read_bundle,
    sign,
)
from codex_ml.train_loop import run_training

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `mine.pem`, `other.pem`, a folder that trusts the first, a signed run and the same run unsigned."""
    folder = tmp_path_factory.mktemp("signing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PASSWORD, "correct horse")
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        patch.delenv("CODEX_ML_KEYS", raising=False)
        for name in ("mine", "other"):
            new_key(folder / f"{name}.pem", "correct horse")
        trust(folder / "mine.pub.pem", folder / "trusted")
        (folder / "nobody").mkdir()
        train(str(folder / "signed"), checkpoint_sign=True, checkpoint_key=str(folder / "mine.pem"), model_args={})
        train(str(folder / "plain"))
    return folder


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No keys but those that a test makes."""
    monkeypatch.setenv(PASSWORD, "correct horse")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("CODEX_ML_KEYS", raising=False)


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the signed run."""
    return Path(shutil.copytree(made / "signed", tmp_path / "run"))


@pytest.fixture
def key(made: Path) -> PrivateKey:
    return load_private(made / "mine.pem", "correct horse")


def named(run: Path, name: str) -> Checkpoint:
    return next(c for c in list_checkpoints(run) if c.name == name)


def alone(run: Path) -> Path:
    """Without the other epochs, so that thousands of looks at one are quick."""
    for name in ("epoch-0001", "epoch-0002"):
        shutil.rmtree(run / name)
    return run


@lru_cache
def known(made: Path) -> tuple[list[PublicKey], str]:
    return trusted_keys(made / "trusted"), json.loads((made / "signed/config.resolved.json").read_text())["run_id"]


def check(made: Path, run: Path, name: str = "epoch-0003") -> None:
    """As a resume looks at a checkpoint."""
    keys, run_id = known(made)
    check_signature(named(run, name), keys, run_id)
    check_parent(named(run, name), keys)


def resigned(run: Path, name: str, key: PrivateKey, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the bundle of a checkpoint and write it in its own form."""
    file = run / name / SIGNATURE
    bundle = json.loads(file.read_text())
    change(bundle)
    file.write_text(json.dumps(bundle, indent=2, ensure_ascii=False) + "\n")


# ---- a run

def test_signing_changes_no_bit_and_signs_every_checkpoint(made: Path) -> None:
    signed, plain = list_checkpoints(made / "signed"), list_checkpoints(made / "plain")
    assert [c.sha256 for c in signed] == [c.sha256 for c in plain] and len(signed) == 3
    for c in signed:
        assert sorted(p.name for p in c.folder.iterdir()) == sorted([*COVERED, SIGNATURE])
        facts = read_bundle(c.folder).facts
        assert facts["epoch"] == c.epoch and facts["global_step"] == c.metadata["global_step"]
        assert facts["config_sha256"] == c.metadata["config_sha256"]
        assert facts["parent_checkpoint_sha256"] == c.metadata["parent_checkpoint_sha256"]
        check(made, made / "signed", c.name)
    assert not list((made / "plain").rglob(SIGNATURE))


def test_a_resume_with_required_comes_to_the_same_bits(made: Path, tmp_path: Path) -> None:
    options = {"checkpoint_sign": True, "checkpoint_key": str(made / "mine.pem"), "checkpoint_signature": "required", "every_steps": 2}
    options["checkpoint_every_steps"] = options.pop("every_steps")
    folder = tmp_path / "parts"
    stopped = train(str(folder), stop_at=5, **options)
    assert (folder / stopped["checkpoint_last"] / SIGNATURE).exists() and stopped["checkpoint_last"].startswith("step-")
    resumed = train(str(folder), **options, checkpoint_trusted_keys=str(made / "trusted"))
    assert resumed["resumed"] and not resumed["resume_meta"]["problems"]
    assert resumed["checkpoint_sha256_last"] == named(made / "plain", "epoch-0003").sha256
    report = verify_run(folder, deep=True, trusted=made / "trusted")
    assert report and all(c["signed_by"] for c in report.checkpoints)


@pytest.mark.parametrize("harm", ["missing", "flipped", "another key"])
def test_a_wrong_signature_makes_a_resume_fall_back(made: Path, run: Path, harm: str) -> None:
    file = run / "epoch-0003" / SIGNATURE
    if harm == "missing":
        file.unlink()
    elif harm == "flipped":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        c = named(run, "epoch-0003")
        other, bundle = load_private(made / "other.pem", "correct horse"), read_bundle(c.folder)
        file.write_text(sign(other, bundle.facts["run_id"], c.name, bundle.digests, c.metadata))
    options = {"checkpoint_trusted_keys": str(made / "trusted"), "checkpoint_sign": True, "checkpoint_key": str(made / "mine.pem")}
    with pytest.raises(CheckpointError, match=r"epoch-0003.*The newest good checkpoint is epoch-0002"):
        train(str(run), checkpoint_strict=True, **options)
    result = train(str(run), **options)
    assert result["resumed_from_epoch"] == 2 and len(result["resume_meta"]["problems"]) == 1
    assert result["checkpoint_sha256_last"] == named(made / "plain", "epoch-0003").sha256
    check(made, run)
    assert (run / "aside-0001/epoch-0003").is_dir()


def test_where_no_signature_holds_nothing_is_begun_anew(made: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made / "plain", tmp_path / "run"))
    before = sorted(p.name for p in run.iterdir())
    with pytest.raises(CheckpointError, match=r"is not signed. No other checkpoint .*checkpoint.signature=warn"):
        train(str(run), checkpoint_trusted_keys=str(made / "trusted"))
    assert sorted(p.name for p in run.iterdir()) == before
    warned = train(str(run), checkpoint_trusted_keys=str(made / "trusted"), checkpoint_signature="warn", epochs=4)
    assert warned["resumed_from_epoch"] == 3 and "is not signed" in warned["resume_meta"]["problems"][0]
    assert train(str(run), checkpoint_trusted_keys=str(made / "trusted"), checkpoint_signature="off")["resume_meta"]["problems"] == []


def test_required_as_soon_as_a_key_is_trusted(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_signing(CheckpointConfig()).mode == "off"
    monkeypatch.setenv("CODEX_ML_KEYS", str(made / "trusted"))
    assert open_signing(CheckpointConfig()).mode == "required"
    assert open_signing(CheckpointConfig(signature="off")).mode == "off"
    assert open_signing(CheckpointConfig(trusted_keys=str(made / "nobody"))).mode == "off"
    monkeypatch.delenv("CODEX_ML_KEYS")
    trust(made / "mine.pub.pem", tmp_path / "config/codex_ml/trusted_keys")
    assert open_signing(CheckpointConfig()).mode == "required"


def test_a_slip_in_the_folders_name_is_no_way_round(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SigningError, match=r"checkpoint.trusted_keys=\S+: there is no such folder"):
        open_signing(CheckpointConfig(trusted_keys=str(made / "trustet")))
    monkeypatch.setenv("CODEX_ML_KEYS", str(made / "trustet"))
    with pytest.raises(SigningError, match="CODEX_ML_KEYS="):
        open_signing(CheckpointConfig())
    with pytest.raises(SigningError, match="no key is trusted"):
        open_signing(CheckpointConfig(signature="required", trusted_keys=str(made / "nobody")))


def test_no_checkpoint_is_ever_there_unsigned(key: PrivateKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    publish = checkpoint_module.publish_folder
    monkeypatch.setattr(checkpoint_module, "publish_folder", lambda tmp, final: (seen.append(sorted(os.listdir(tmp))), publish(tmp, final)))
    state = {"epoch": 1, "global_step": 1}
    save_checkpoint(tmp_path, "epoch-0001", state, state, {}, lambda *said: sign(key, "5eed", *said))
    assert seen == [sorted([*COVERED, SIGNATURE])]

    def fails(*said: Any) -> str:
        raise StorageError(5, "the key's token was pulled out")

    with pytest.raises(StorageError):
        save_checkpoint(tmp_path, "epoch-0002", state, state, {}, fails)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch-0001"]


# ---- those who only read a run

@pytest.fixture(scope="module")
def told(made: Path) -> Path:
    """A signed run of three epochs that its folder describes whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PASSWORD, "correct horse")
        patch.setenv("XDG_CONFIG_HOME", str(made / "config"))
        (made / "text.txt").write_text("".join(f"{i} and {i % 7} make {i + i % 7}\n" for i in range(120)))
        run_training(model="tiny", data=made / "text.txt", block_size=16, epochs=3, batch_size=8, progress="off", threads=1,
                     checkpoint_dir=made / "told", checkpoint_sign=True, checkpoint_key=str(made / "mine.pem"))
    return made / "told"


def unsigned(made: Path, run: Path, name: str) -> None:
    (run / name / SIGNATURE).unlink()


def by_another_key(made: Path, run: Path, name: str) -> None:
    c = named(run, name)
    bundle = read_bundle(c.folder)
    said = sign(load_private(made / "other.pem", "correct horse"), bundle.facts["run_id"], name, bundle.digests, c.metadata)
    (c.folder / SIGNATURE).write_text(said)


def older_put_in_its_place(made: Path, run: Path, name: str) -> None:
    shutil.rmtree(run / name)
    shutil.copytree(run / "epoch-0001", run / name)


def older_made_to_fit(made: Path, run: Path, name: str) -> None:
    """Its records say that it is the newer one, and their signature is the older one's."""
    facts = {field: named(run, name).metadata[field] for field in ("epoch", "global_step", "parent_checkpoint_sha256")}
    older_put_in_its_place(made, run, name)
    file = run / name / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


HARMS: dict[Callable[[Path, Path, str], None], str] = {
    unsigned: "is not signed", by_another_key: "which is not trusted here", older_put_in_its_place: "belongs to another checkpoint",
    older_made_to_fit: "was made for another place or content"}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An entry for each checkpoint of which anything was built."""
    seen: list[str] = []
    real = checkpoint_module.deserialize
    monkeypatch.setattr(checkpoint_module, "deserialize", lambda file: (seen.append(str(file)), real(file))[1])
    return seen


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize(("command", "code"), [("evaluate", 4), ("replay", 6)])
def test_a_command_that_uses_a_checkpoint_asks_for_its_signature(
        made: Path, told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loads: list[str],
        harm: Callable[[Path, Path, str], None], command: str, code: int) -> None:
    run = Path(shutil.copytree(told, tmp_path / "run"))
    monkeypatch.setenv("CODEX_ML_KEYS", str(made / "trusted"))
    harm(made, run, "epoch-0003")
    before = sorted(p.name for p in run.iterdir())
    assert main([command, str(run)]) == code
    said = capsys.readouterr().err
    assert HARMS[harm] in said and "signature=warn" in said and said.count("\n") == 1 and "epoch-0003" in said
    assert loads == [] and sorted(p.name for p in run.iterdir()) == before


@pytest.mark.parametrize("harm", [unsigned, by_another_key, older_made_to_fit])
def test_a_replay_does_not_begin_at_a_checkpoint_that_nobody_signed(
        made: Path, told: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], loads: list[str],
        harm: Callable[[Path, Path, str], None]) -> None:
    run = Path(shutil.copytree(told, tmp_path / "run"))
    harm(made, run, "epoch-0002")
    assert main(["replay", str(run), "--keys", str(made / "trusted")]) == 6
    assert HARMS[harm] in capsys.readouterr().err and loads == []


def test_with_a_good_signature_and_with_less_asked_for_they_are_used(made: Path, told: Path, tmp_path: Path,
                                                                     capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(told, tmp_path / "run"))
    keys = str(made / "trusted")
    assert main(["evaluate", str(run), f"keys={keys}"]) == 0 and main(["replay", str(run), "--keys", keys]) == 0
    found = replay(run, trusted=keys)  # in a process of its own
    assert found.same and found.remarks == []
    capsys.readouterr()
    unsigned(made, run, "epoch-0003")
    assert main(["evaluate", str(run)]) == 0 and main(["replay", str(run)]) == 0  # no key is trusted
    capsys.readouterr()
    assert main(["evaluate", str(run), f"keys={keys}", "checkpoint=epoch-0002"]) == 0
    assert "epoch-0003 is not signed" in " ".join(evaluate_run(run, trusted=keys, signature="warn")["notes"])
    capsys.readouterr()
    assert main(["replay", str(run), "--keys", keys, "--signature", "warn"]) == 0
    assert "note: " in (said := capsys.readouterr().out) and "epoch-0003 is not signed" in said
    assert "is not signed" in replay(run, trusted=keys, signature="warn", fresh=True).remarks[0]
    with pytest.raises(SignatureError, match="is not signed"):
        replay(run, trusted=keys)
    shutil.rmtree(run / "epoch-0003")
    assert "nobody signs" in replay(run, epoch=3, trusted=keys, fresh=False).remarks[0]


def test_the_run_that_is_read_has_no_say_in_what_is_asked(made: Path, told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path(shutil.copytree(told, tmp_path / "run"))
    unsigned(made, run, "epoch-0003")
    file = run / "config.resolved.json"
    recorded = json.loads(file.read_text())
    recorded["values"]["checkpoint.signature"]["value"] = "off"
    file.write_text(json.dumps(recorded))
    monkeypatch.setenv("CODEX_ML_KEYS", str(made / "trusted"))
    with pytest.raises(CheckpointError, match="is not signed"):
        evaluate_run(run)
    with pytest.raises(SignatureError, match="is not signed"):
        replay(run)


def test_the_workspace_has_a_say(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_policy().mode == "off"
    (tmp_path / "settings.ini").write_text(f"[codex_ml]\ncheckpoint.trusted_keys = {made / 'trusted'}\n")
    assert open_policy().mode == "required" and open_policy(signature="warn").mode == "warn"
    (tmp_path / "settings.ini").write_text(f"[codex_ml]\ncheckpoint.trusted_keys = {made / 'trusted'}\ncheckpoint.signature = off\n")
    assert open_policy().mode == "off" and open_policy(made / "trusted").mode == "required"
    with pytest.raises(SigningError, match="signature=maybe: it is one of required, warn, off"):
        open_policy(signature="maybe")


@pytest.mark.parametrize("words", [["evaluate", "RUN", "keys=nowhere"], ["replay", "RUN", "--keys", "nowhere"],
                                   ["diff", "RUN", "RUN", "--keys", "nowhere"], ["evaluate", "RUN", "signature=required"],
                                   ["replay", "RUN", "--signature", "warn"], ["diff", "RUN", "RUN", "--signature", "warn"]])
def test_keys_that_are_not_there_are_one_line(told: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(told) if word == "RUN" else word for word in words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "codex-ml keys trust PUBKEY" in said


def test_a_difference_does_not_look_into_weights_that_nobody_signed(made: Path, tmp_path: Path, loads: list[str]) -> None:
    a, b = (Path(shutil.copytree(made / "signed", tmp_path / name)) for name in "ab")
    shutil.rmtree(b / "epoch-0003")
    shutil.copytree(b / "epoch-0002", b / "epoch-0003")
    facts = {field: named(a, "epoch-0003").metadata[field] for field in ("epoch", "global_step")}
    file = b / "epoch-0003/metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))
    found = first_difference(a, b, trusted=made / "trusted")
    assert not found.same and len(loads) <= 1 and "its weights are not looked at" in " ".join(found.notes)
    assert "not looked at" not in " ".join(first_difference(a, b).notes)


def test_a_deep_look_builds_nothing_that_nobody_signed(made: Path, run: Path, loads: list[str]) -> None:
    unsigned(made, run, "epoch-0003")
    assert not verify_run(run, deep=True, trusted=made / "trusted") and len(loads) == 2
    loads.clear()
    assert verify_run(run, deep=True, trusted=made / "nobody") and len(loads) == 3


@pytest.mark.parametrize(("mode", "code", "state"), [("warn", 0, "verified"), ("off", 0, "verified"), ("required", 6, "refused")])
def test_verify_asks_for_as_much_as_it_is_told(made: Path, run: Path, capsys: pytest.CaptureFixture[str], loads: list[str], mode: str,
                                               code: int, state: str) -> None:
    unsigned(made, run, "epoch-0003")
    assert main(["verify", str(run), "--deep", "--keys", str(made / "trusted"), "--signature", mode]) == code
    out = capsys.readouterr().out
    [row] = [line for line in out.splitlines() if line.startswith("  epoch-0003")]
    assert row.split()[4:] == [state, "not", "signed"] and "BROKEN" not in out, "its bytes are good"
    assert ("note: " in out and "epoch-0003 is not signed" in out) == (mode == "warn")
    assert len(loads) == (2 if mode == "required" else 3)
    (run / "epoch-0003/checkpoint.pt").write_bytes(b"zeros")
    assert main(["verify", str(run), "--keys", str(made / "trusted"), "--signature", mode]) == 6
    assert "BROKEN" in capsys.readouterr().out


def test_verify_tells_a_wrong_signature_from_none(made: Path, run: Path) -> None:
    by_another_key(made, run, "epoch-0002")
    report = verify_run(run, trusted=made / "trusted")
    assert [c["signature"] for c in report.checkpoints] == ["good", "wrong", "good"] and all(c["content"] for c in report.checkpoints)
    assert "refused   its signature does not hold here" in str(report)
    with pytest.raises(SigningError, match="signature=maybe"):
        verify_run(run, signature="maybe")


def test_signing_with_a_key_that_nobody_trusts_is_told_once(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"checkpoint_sign": True, "checkpoint_trusted_keys": str(made / "trusted"), "epochs": 2}
    with caplog.at_level(logging.WARNING, "codex_ml"):
        train(str(tmp_path / "a"), checkpoint_key=str(made / "other.pem"), **options)
    [line] = [record.getMessage() for record in caplog.records]
    assert "not among the trusted ones" in line and f"`codex-ml keys trust {made}/other.pub.pem --keys {made}/trusted`" in line
    assert not verify_run(tmp_path / "a", trusted=made / "trusted")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "codex_ml"):
        train(str(tmp_path / "b"), checkpoint_key=str(made / "mine.pem"), **options)
        train(str(tmp_path / "c"), checkpoint_sign=True, checkpoint_key=str(made / "other.pem"), epochs=2)  # nobody trusts any
    assert caplog.records == []


@pytest.mark.parametrize("there", [True, False])
def test_the_command_that_a_hint_names_does_what_it_says(made: Path, words: list[str], tmp_path: Path, there: bool,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "our keys"
    if there:
        folder.mkdir()
    asks = [f"checkpoint.trusted_keys={folder}", "checkpoint.signature=required"]
    assert main([*words, *asks]) == 2
    hint = capsys.readouterr().err.split("`")[1].replace("PUBKEY", str(made / "mine.pub.pem"))
    assert main(shlex.split(hint)[1:]) == 0
    said = capsys.readouterr().out
    assert "From now on" not in said and f"Where {folder} is asked" in said
    assert main([*words, *asks]) == 0 and not (tmp_path / "config").exists()


def test_the_hints_for_the_usual_folders_name_no_other(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SigningError, match="`codex-ml keys trust PUBKEY` puts one into"):
        open_signing(CheckpointConfig(signature="required"))
    by_another_key(made, run, "epoch-0003")
    found = " ".join(f.problem for f in verify_run(run, trusted=made / "trusted").findings)
    assert found.endswith(f"codex-ml keys trust PUBKEY --keys {made}/trusted")
    assert main(["keys", "trust", str(made / "mine.pub.pem")]) == 0 and "From now on only" in capsys.readouterr().out
    monkeypatch.setenv("CODEX_ML_KEYS", str(tmp_path / "env"))
    with pytest.raises(SigningError, match="there is no such folder of trusted keys; `codex-ml keys trust PUBKEY` makes it"):
        open_signing(CheckpointConfig())
    assert main(["keys", "trust", str(made / "mine.pub.pem")]) == 0
    assert "as long as CODEX_ML_KEYS names this folder" in capsys.readouterr().out and trusted_keys(tmp_path / "env")


# ---- afterwards

def test_an_unsigned_run_can_be_signed_and_then_agrees(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(made / "plain", tmp_path / "run"))
    words = ["keys", "sign", str(run), "--key", str(made / "mine.pem")]
    assert main(words) == 0 and capsys.readouterr().out.count("\nsigned: ") == 2
    report = verify_run(run, deep=True, trusted=made / "trusted")
    assert report and all(c["signed_by"] for c in report.checkpoints)
    before = {p: p.read_bytes() for p in run.rglob(SIGNATURE)}
    assert len(before) == 3 and main(words) == 0 and {p: p.read_bytes() for p in run.rglob(SIGNATURE)} == before
    resumed = train(str(run), epochs=4, checkpoint_trusted_keys=str(made / "trusted"))
    assert resumed["resumed_from_epoch"] == 3 and not resumed["resume_meta"]["problems"]
    assert main([*words[:3], "--key", str(made / "other.pem")]) == 6  # another's signature is never replaced
    assert {p: p.read_bytes() for p in run.rglob(SIGNATURE)} == before


def broken_weights(run: Path) -> None:
    file = run / "epoch-0002/checkpoint.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def other_place(run: Path) -> None:
    shutil.rmtree(run / "epoch-0002")
    shutil.copytree(run / "epoch-0001", run / "epoch-0002")
    file = run / "epoch-0002/metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"epoch": 2}))


def no_run_id(run: Path) -> None:
    (run / "config.resolved.json").unlink()


def stray(run: Path) -> None:
    (run / "epoch-0002/model.safetensors").write_bytes(b"other weights")


@pytest.mark.parametrize(("harm", "said"), [(broken_weights, "was recorded"), (other_place, "belongs to another place"),
                                            (no_run_id, "which run this is"), (stray, "lies among the files")])
def test_what_does_not_hold_is_not_signed(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None],
                                          said: str) -> None:
    run = Path(shutil.copytree(made / "plain", tmp_path / "run"))
    harm(run)
    assert main(["keys", "sign", str(run), "--key", str(made / "mine.pem")]) == 6
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not list(run.rglob(SIGNATURE))


def test_nothing_to_sign(made: Path, tmp_path: Path) -> None:
    assert main(["keys", "sign", str(tmp_path / "nowhere"), "--key", str(made / "mine.pem")]) == 2
    assert main(["keys", "sign", str(made / "plain"), "--key", str(tmp_path / "nowhere.pem")]) == 2


# ---- every byte

@pytest.mark.parametrize("name", [SIGNATURE, "metadata.json", "run_manifest.json"])
def test_every_flipped_byte_is_found(made: Path, run: Path, name: str) -> None:
    check(made, alone(run))
    file = run / "epoch-0003" / name
    good = file.read_bytes()
    for i in range(len(good)):
        bad = bytearray(good)
        bad[i] ^= 1 << i % 8
        file.write_bytes(bad)
        with pytest.raises(CorruptFile):
            check(made, run)
    file.write_bytes(good)
    check(made, run)


@pytest.mark.parametrize("name", [SIGNATURE, "metadata.json", "run_manifest.json"])
def test_every_other_length_is_found(made: Path, run: Path, name: str) -> None:
    file = alone(run) / "epoch-0003" / name
    good = file.read_bytes()
    for bad in [*(good[:i] for i in range(len(good))), good + b"\n", good + b" ", bytes(len(good))]:
        file.write_bytes(bad)
        with pytest.raises(CorruptFile):
            check(made, run)


# ---- another place

@pytest.mark.parametrize("files", [[SIGNATURE], ["metadata.json"], ["metadata.json", SIGNATURE], [*COVERED, SIGNATURE]])
def test_files_of_another_epoch_are_found(made: Path, run: Path, files: list[str]) -> None:
    for name in files:
        shutil.copy(run / "epoch-0002" / name, run / "epoch-0003" / name)
    with pytest.raises(CorruptFile):
        check(made, run)


def test_an_older_epoch_under_a_newer_ones_name_is_found(made: Path, run: Path) -> None:
    """With its metadata changed so that it would fit."""
    old, new = run / "epoch-0002", run / "epoch-0003"
    shutil.rmtree(new)
    shutil.copytree(old, new)
    metadata = json.loads((new / "metadata.json").read_text())
    (new / "metadata.json").write_text(json.dumps(metadata | {"epoch": 3}))
    with pytest.raises(SignatureError):
        check(made, run)
    result = train(str(run), checkpoint_trusted_keys=str(made / "trusted"))
    assert result["resumed_from_epoch"] == 2
    assert result["checkpoint_sha256_last"] == named(made / "plain", "epoch-0003").sha256


def test_the_same_epoch_of_another_run_is_found(made: Path, run: Path, tmp_path: Path) -> None:
    """Of the same configuration, so that even the hash of its weights is the same, and signed with the same key."""
    twin = tmp_path / "twin"
    train(str(twin), checkpoint_sign=True, checkpoint_key=str(made / "mine.pem"))
    shutil.rmtree(run / "epoch-0003")
    shutil.copytree(twin / "epoch-0003", run / "epoch-0003")
    with pytest.raises(SignatureError, match="run_id is '[0-9a-f]{32}' here, and '[0-9a-f]{32}' was signed"):
        check(made, run)
    assert "signature" in [f.field for f in verify_run(run, trusted=made / "trusted").findings]


def test_an_earlier_state_of_the_same_run_does_not_fit_its_parent(made: Path, run: Path, key: PrivateKey) -> None:
    """Epoch 3 was made twice, after two different second epochs; the first one is put back."""
    c = named(run, "epoch-0003")
    metadata = c.metadata | {"parent_checkpoint_sha256": "ab" * 32}
    run_id = read_bundle(c.folder).facts["run_id"]
    (run / "old").mkdir()
    old = save_checkpoint(run / "old", "epoch-0003", {"epoch": 3, "global_step": metadata["global_step"]}, metadata, {"python": "3.11"},
                          lambda *said: sign(key, run_id, *said))
    shutil.rmtree(c.folder)
    shutil.move(old.folder, run / "epoch-0003")
    with pytest.raises(SignatureError, match="its parent has SHA-256 abab"):
        check(made, run)
    assert train(str(run), checkpoint_trusted_keys=str(made / "trusted"))["resumed_from_epoch"] == 2


def test_a_statement_over_other_weights_is_found(made: Path, run: Path, key: PrivateKey) -> None:
    c = named(run, "epoch-0003")
    bundle = read_bundle(c.folder)
    said = sign(key, bundle.facts["run_id"], c.name, {**bundle.digests, "checkpoint.pt": "ab" * 32}, c.metadata)
    (c.folder / SIGNATURE).write_text(said)
    with pytest.raises(SignatureError, match=r"the hash of checkpoint.pt is '[0-9a-f]{64}' here, and 'abab"):
        check(made, run)


def test_another_file_among_signed_ones_is_found(made: Path, run: Path) -> None:
    (run / "epoch-0003/model.safetensors").write_bytes(b"other weights")
    with pytest.raises(SignatureError, match=r"model.safetensors lies among signed files"):
        check(made, run)


def test_a_pipe_or_a_link_in_place_of_a_signature_is_refused(made: Path, run: Path) -> None:
    file = run / "epoch-0003" / SIGNATURE
    elsewhere = shutil.move(file, run / "elsewhere.json")
    file.symlink_to(elsewhere)
    with pytest.raises(SignatureError, match="symbolic link"):
        check(made, run)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(SignatureError, match="not a regular file"):
        check(made, run)


# ---- altered bundles

def swap_type(bundle: dict[str, Any]) -> None:
    bundle["dsseEnvelope"]["payloadType"] = "application/vnd.other+json"


def change_statement(bundle: dict[str, Any]) -> None:
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"]).replace(b'"epoch": 3', b'"epoch": 4')
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()


def two_signatures(bundle: dict[str, Any]) -> None:
    bundle["dsseEnvelope"]["signatures"] *= 2


def older_bundle(bundle: dict[str, Any]) -> None:
    bundle["mediaType"] = "application/vnd.dev.sigstore.bundle+json;version=0.2"


def no_signature(bundle: dict[str, Any]) -> None:
    bundle["dsseEnvelope"]["signatures"] = []


def ed25519_signature(bundle: dict[str, Any]) -> None:
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
    signature = b"\x00" + ed25519.Ed25519PrivateKey.generate().sign(pae(payload))[1:]
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(signature).decode()


@pytest.mark.parametrize(("change", "message"), [
    (swap_type, "payloadType is 'application/vnd.other"), (change_statement, "its statement or its signature was changed"),
    (two_signatures, "it was changed after it was written"), (older_bundle, "mediaType is"), (no_signature, "is not a signature"),
    (ed25519_signature, "64 bytes, as Ed25519 makes them"),
])
def test_a_changed_bundle_is_told(made: Path, run: Path, key: PrivateKey, change: Callable[[dict[str, Any]], None], message: str) -> None:
    resigned(run, "epoch-0003", key, lambda bundle: None)
    check(made, run)  # writing it anew alone changes nothing
    resigned(run, "epoch-0003", key, change)
    with pytest.raises(SignatureError, match=message):
        check(made, run)


def test_a_signature_over_another_payload_type_does_not_hold(made: Path, run: Path, key: PrivateKey) -> None:
    def other_type(bundle: dict[str, Any]) -> None:
        payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
        signed = pae(payload).replace(PAYLOAD_TYPE.encode(), b"application/vnd.in-toto+yaml")
        bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(key.sign(signed)).decode()

    resigned(run, "epoch-0003", key, other_type)
    with pytest.raises(SignatureError, match="was changed after"):
        check(made, run)


def test_a_trusted_fingerprint_over_another_keys_signature_does_not_hold(made: Path, run: Path, key: PrivateKey) -> None:
    other = load_private(made / "other.pem", "correct horse")

    def by_other(bundle: dict[str, Any]) -> None:
        payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
        bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(other.sign(pae(payload))).decode()

    resigned(run, "epoch-0003", key, by_other)
    with pytest.raises(SignatureError, match="was changed after"):
        check(made, run)


def test_a_nested_or_huge_bundle_is_one_line(made: Path, run: Path) -> None:
    for text in ('{"mediaType": ' * 100_000, "[]", "{}", '{"mediaType": NaN}', "\ufeff{}", " " * (17 << 20)):
        (run / "epoch-0003" / SIGNATURE).write_text(text)
        with pytest.raises(SignatureError) as caught:
            check(made, run)
        assert "\n" not in str(caught.value) and SIGNATURE in str(caught.value)


# ---- keys

def pem(secret: Any, password: bytes | None = None) -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return secret.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def public_pem(secret: Any) -> bytes:
    return secret.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def test_a_new_key_is_secret_from_its_first_instant(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        public = new_key(tmp_path / "a.pem", "pw")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.pem").stat().st_mode) == 0o600
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in (tmp_path / "a.pem").read_bytes()
    assert load_public(tmp_path / "a.pub.pem") == public
    before = (tmp_path / "a.pem").read_bytes()
    with pytest.raises(SigningError, match="never overwritten"):
        new_key(tmp_path / "a.pem", "pw")
    with pytest.raises(SigningError, match="needs a password"):
        new_key(tmp_path / "b.pem", "")
    assert (tmp_path / "a.pem").read_bytes() == before and not (tmp_path / "b.pem").exists()


def test_each_wrong_key_has_its_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edwards, wide = ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())
    files = {"ed.pem": pem(edwards), "ed.pub.pem": public_pem(edwards), "wide.pem": pem(wide), "text.pem": b"hello\n", "empty.pem": b"",
             "torn.pem": pem(wide)[:120], "fine.pem": pem(ec.generate_private_key(ec.SECP256R1())),
             "locked.pem": pem(ec.generate_private_key(ec.SECP256R1()), b"other")}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).chmod(0o600)
    os.mkfifo(tmp_path / "pipe.pem")
    for name, message in {"ed.pem": "of the kind Ed25519.*ECDSA over P-256", "wide.pem": "of the kind ECDSA over secp384r1",
                          "text.pem": "not a key in PEM", "empty.pem": "not a key in PEM", "torn.pem": "not a private key that can be read",
                          "pipe.pem": "not a regular file",
                          "ed.pub.pem": "holds a public key, and a private one", "nowhere.pem": "keys new",
                          "locked.pem": f"the password does not open .*{PASSWORD}"}.items():
        with pytest.raises(SigningError, match=message) as caught:
            load_private(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    for name, message in {"ed.pub.pem": "of the kind Ed25519", "fine.pem": "holds a private key, and a public one"}.items():
        with pytest.raises(SigningError, match=message):
            trust(tmp_path / name, tmp_path / "trusted")
    assert load_private(tmp_path / "fine.pem").public
    monkeypatch.delenv(PASSWORD)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(SigningError, match=f"needs a password: set {PASSWORD}"):
        load_private(tmp_path / "locked.pem")


def test_a_key_that_others_can_read_is_told(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = Path(shutil.copy(made / "mine.pem", tmp_path / "open.pem"))
    copy.chmod(0o644)
    with caplog.at_level(logging.WARNING, "codex_ml"):
        load_private(copy)
        assert f"{copy} can be read by others (mode 0644): chmod 600 {copy}" in caplog.text
    caplog.clear()
    copy.chmod(0o600)
    load_private(copy)
    assert caplog.text == ""


def test_a_trusted_file_that_is_no_key_is_never_passed_over(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "trusted", tmp_path / "trusted")
    (tmp_path / "trusted/z.pem").write_bytes(public_pem(ed25519.Ed25519PrivateKey.generate()))
    with pytest.raises(SigningError, match=r"z\.pem is a key of the kind Ed25519"):
        open_signing(CheckpointConfig(trusted_keys=str(tmp_path / "trusted")))


def test_two_keys_of_one_name_can_be_trusted(made: Path, tmp_path: Path) -> None:
    new_key(tmp_path / "mine.pem", "pw")
    for file in (made / "mine.pub.pem", tmp_path / "mine.pub.pem", made / "mine.pub.pem"):
        trust(file, tmp_path / "trusted")
    assert len(trusted_keys(tmp_path / "trusted")) == 2


# ---- what other tools say

def test_model_signing_verifies_it(made: Path, run: Path) -> None:
    verifying = pytest.importorskip("model_signing.verifying", exc_type=ImportError)

    def verify(public: str) -> None:
        verifying.Config().use_elliptic_key_verifier(public_key=made / public).verify(run / "epoch-0003", run / "epoch-0003" / SIGNATURE)

    verify("mine.pub.pem")
    with pytest.raises(ValueError, match="Key mismatch"):
        verify("other.pub.pem")
    (run / "epoch-0003/extra").touch()
    with pytest.raises(ValueError, match="Extra files"):
        verify("mine.pub.pem")
    (run / "epoch-0003/extra").unlink()
    (run / "epoch-0003/run_manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="Hash mismatch"):
        verify("mine.pub.pem")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")
def test_openssl_verifies_it(made: Path, run: Path, tmp_path: Path) -> None:
    envelope = json.loads((run / "epoch-0003" / SIGNATURE).read_text())["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])

    def verify(public: str, payload: bytes) -> bool:
        (tmp_path / "signed").write_bytes(b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(payload), payload))
        (tmp_path / "signature").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
        words = ["openssl", "dgst", "-sha256", "-verify", made / public, "-signature", tmp_path / "signature", tmp_path / "signed"]
        return subprocess.run(words, capture_output=True, timeout=30).returncode == 0

    assert verify("mine.pub.pem", payload)
    assert not verify("other.pub.pem", payload)
    assert not verify("mine.pub.pem", payload.replace(b'"epoch": 3', b'"epoch": 2'))
    words = ["openssl", "pkey", "-in", made / "mine.pem", "-pubout", "-passin"]
    key = subprocess.run([*words, "pass:correct horse"], capture_output=True, timeout=30)
    assert key.stdout == (made / "mine.pub.pem").read_bytes()
    assert subprocess.run([*words, "pass:wrong"], capture_output=True, timeout=30).returncode


# ---- the command line

@pytest.fixture
def words(tmp_path: Path) -> Iterator[list[str]]:
    (tmp_path / "poem.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    yield ["train", f"data={tmp_path / 'poem.txt'}", "model_name=tiny", "block_size=16", "epochs=2", "threads=1", "progress=off",
           f"checkpoint.dir={tmp_path / 'run'}"]


def test_from_a_new_key_to_a_verified_run(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    default = tmp_path / "config/codex_ml/signing_key.pem"
    assert main(["keys", "list"]) == 0 and "no key is trusted" in capsys.readouterr().out
    assert main(["keys", "new"]) == 0 and default.exists()
    assert main(["keys", "new"]) == 2 and "never overwritten" in capsys.readouterr().err
    assert main(["keys", "trust", str(default.with_name("signing_key.pub.pem"))]) == 0
    capsys.readouterr()
    assert main(["keys", "list"]) == 0
    assert load_private(default).public.fingerprint in capsys.readouterr().out
    assert main([*words, "checkpoint.sign=true"]) == 0
    assert main([*words, "checkpoint.sign=true", "checkpoint.resume=true", "epochs=3"]) == 0
    assert main(["verify", str(tmp_path / "run"), "--deep"]) == 0
    assert "signed by" in capsys.readouterr().out
    (tmp_path / "run/epoch-0002" / SIGNATURE).unlink()
    assert main(["verify", str(tmp_path / "run")]) == 6
    assert "epoch-0002 is not signed" in capsys.readouterr().out


def test_a_damaged_record_costs_a_signed_run_not_its_name(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is signed names the run. Under a new name, the run would refuse its own checkpoints from then on."""
    assert main(["keys", "new"]) == 0
    assert main(["keys", "trust", str(tmp_path / "config/codex_ml/signing_key.pub.pem")]) == 0
    assert main([*words, "checkpoint.sign=true"]) == 0
    record = tmp_path / "run/config.resolved.json"
    run_id = json.loads(record.read_text())["run_id"]
    record.write_text("{")
    assert main([*words, "checkpoint.sign=true", "checkpoint.resume=true", "epochs=3"]) == 0
    assert json.loads(record.read_text())["run_id"] == run_id
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "run"), "--deep"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(("more", "message"), [
    (["checkpoint.sign=true"], "cannot be read"), (["checkpoint.sign=true", "checkpoint.key=nowhere.pem"], "nowhere.pem"),
    (["checkpoint.signature=required"], "no key is trusted"), (["checkpoint.signature=requird"], "did you mean 'required'"),
    (["checkpoint.trusted_keys=nowhere"], "no such folder"),
])
def test_what_cannot_be_is_told_before_anything_is_written(words: list[str], tmp_path: Path, more: list[str], message: str,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, *more]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_off_is_a_word_and_no_truth_value(words: list[str], made: Path) -> None:
    assert main([*words, "checkpoint.signature=off", f"checkpoint.trusted_keys={made / 'trusted'}"]) == 0


def test_a_refused_resume_has_its_exit_code(words: list[str], made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert main([*words, "checkpoint.resume=true", f"checkpoint.trusted_keys={made / 'trusted'}"]) == 4
    assert "is not signed" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["keys"], ["keys", "trust"], ["keys", "trust", "nowhere.pem"], ["keys", "forget", "x"]])
def test_words_that_keys_does_not_know(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 2
    assert "Traceback" not in capsys.readouterr().err
