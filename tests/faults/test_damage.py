"""Every file of a run is damaged in every way: what is wrong is never used, and the newest that is good is taken.

No hash covers `metadata.json` and the other small files of an unsigned run: a flipped bit there is found where it makes the file
unreadable or contradicts the state, and harmless otherwise. What is asserted is that the state that comes back is one that was saved.
"""

import json
import shutil

import pytest
import torch
from damage import chosen, cuts, flips, replaced
from runs import Zygote
from scenarios import is_whole, place, put, resume

from codex_ml.checkpoint import CheckpointError, list_checkpoints, newest_verified, verify_checkpoint
from codex_ml.data import DataError
from codex_ml.durable import CorruptFile
from codex_ml.telemetry.ndjson import NdjsonWriter, read_ndjson
from codex_ml.telemetry.record import scalar_record
from codex_ml.train_loop import run_training

EPOCHS = ("epoch-0001", "epoch-0002", "epoch-0003")


@pytest.fixture
def three(scratch):
    """Three small checkpoints, as `scenarios` has them."""
    for name in EPOCHS:
        put(scratch / "run", name)
    return scratch / "run"


@pytest.fixture(scope="module")
def zygote():
    with Zygote() as zygote:
        yield zygote


@pytest.fixture(scope="module")
def trained(zygote, tmp_path_factory):
    """A real run of three epochs, to be copied, and the hash of one of four."""
    folder = tmp_path_factory.mktemp("trained")
    zygote.run(folder=str(folder / "run"))
    return folder / "run", zygote.run(folder=str(folder / "longer"), epochs=4)["checkpoint_sha256_last"]


# ---- the state itself


def refused(run, path, ways, before):
    """How many ways to spoil the newest checkpoint's content were found; `before` is what has to come back instead."""
    good, found = path.read_bytes(), 0
    for what, content in ways:
        path.write_bytes(content)
        checkpoint, state, problems = newest_verified(run)
        assert checkpoint is not None and checkpoint.name == path.parent.parent.joinpath(before).name, what
        assert len(problems) == 1 and str(path) in problems[0], what
        assert before != "epoch-0002" or "note" not in state or is_whole(state, before), what
        found += 1
    path.write_bytes(good)
    assert newest_verified(run)[0].name == path.parent.name
    return found


def test_a_checkpoint_with_any_bit_flipped_is_never_used(three, full, tally):
    path = three / "epoch-0003" / "checkpoint.pt"
    found = refused(three, path, flips(path.read_bytes(), full, 1), "epoch-0002")
    tally("damage", "checkpoint.pt, one bit flipped", found=found, silent=0)


def test_a_checkpoint_of_any_other_length_is_never_used(three, full, rng, tally):
    path = three / "epoch-0003" / "checkpoint.pt"
    content = path.read_bytes()
    found = refused(three, path, [*cuts(content, full, 3), *replaced(content, rng)], "epoch-0002")
    tally("damage", "checkpoint.pt, cut at every length, or replaced", found=found, silent=0)


def test_a_trained_checkpoint_with_any_byte_spoilt_is_never_used(trained, scratch, full, rng, tally):
    run = shutil.copytree(trained[0], scratch / "run")
    path = run / "epoch-0003" / "checkpoint.pt"
    content = path.read_bytes()
    bits = refused(run, path, flips(content, False, 1 if full else 16), "epoch-0002")
    lengths = refused(run, path, [*cuts(content, full, 64), *replaced(content, rng)], "epoch-0002")
    tally("damage", "checkpoint.pt, one bit flipped", found=bits, silent=0)
    tally("damage", "checkpoint.pt, cut at every length, or replaced", found=lengths, silent=0)


# ---- what stands beside it


@pytest.mark.parametrize("how", ("flipped", "cut"))
def test_damaged_metadata_bring_back_no_other_state(three, how, full, rng, tally):
    path = three / "epoch-0003" / "metadata.json"
    content, passed, harmless = path.read_bytes(), 0, 0
    ways = flips(content, full, 1) if how == "flipped" else [*cuts(content, full, 1), *replaced(content, rng)]
    for what, spoilt in ways:
        path.write_bytes(spoilt)
        checkpoint, state, problems = newest_verified(three)
        assert checkpoint is not None and is_whole(state, checkpoint.name), what
        assert checkpoint.name == "epoch-0003" or (checkpoint.name == "epoch-0002" and problems), what
        passed, harmless = passed + (checkpoint.name == "epoch-0002"), harmless + (checkpoint.name == "epoch-0003")
        if how == "cut":
            assert checkpoint.name == "epoch-0002" or spoilt.strip() == content.strip(), what
    tally("damage", f"metadata.json, {'one bit flipped' if how == 'flipped' else 'cut at every length, or replaced'}",
          found=passed, harmless=harmless, silent=0)


@pytest.mark.parametrize("file", ("latest.json", "latest.json.bak"))
def test_a_damaged_pointer_costs_no_checkpoint(three, file, full, rng, tally):
    path = three / file
    good = {p: p.read_bytes() for p in (three / "latest.json", three / "latest.json.bak")}
    content, tried = path.read_bytes(), 0
    for what, spoilt in [*flips(content, full, 2), *cuts(content, full, 4), *replaced(content, rng)]:
        for p, c in good.items():
            p.write_bytes(c)
        path.write_bytes(spoilt)
        assert resume(three, strict=False) == "epoch-0003", what
        assert json.loads((three / "latest.json").read_bytes())["path"] == "epoch-0003", what
        tried += 1
    tally("damage", f"{file}, flipped, cut, replaced", newest_taken=tried, silent=0)


@pytest.mark.parametrize("file", ("checkpoint.pt", "metadata.json", "run_manifest.json", "both"))
def test_files_of_another_checkpoint_are_not_taken_for_its_own(scratch, file, tally):
    names = (*EPOCHS, "step-00000034", "step-00000037")
    run, tried = scratch / "run", 0
    for name in names:
        put(run, name)
    for target in names:
        for source in names:
            if source == target:
                continue
            kept = {p: p.read_bytes() for p in (run / target).iterdir()}
            for each in ("checkpoint.pt", "metadata.json") if file == "both" else (file,):
                shutil.copy(run / source / each, run / target / each)
            checkpoint, state, _ = newest_verified(run)
            assert checkpoint is not None and is_whole(state, checkpoint.name), f"{file} of {source} in {target}"
            [there] = [c for c in list_checkpoints(run) if c.name == target]
            if file == "run_manifest.json":
                assert checkpoint.name == names[-1]
            else:
                assert checkpoint.name == (names[-2] if target == names[-1] else names[-1])
                if file != "both" or not there.metadata:
                    with pytest.raises(CorruptFile):
                        verify_checkpoint(there)
            for p, c in kept.items():
                p.write_bytes(c)
            tried += 1
    assert place(names[-1]) == (3, 37)
    tally("damage", "files of another checkpoint in its place", found=0 if file == "run_manifest.json" else tried,
          harmless=tried if file == "run_manifest.json" else 0, silent=0)


# ---- a real run goes on over any damage

FILES = ("checkpoint.pt", "metadata.json", "run_manifest.json", "latest.json", "latest.json.bak", "config.resolved.json",
         "config.snapshot.json", "metrics_history.jsonl", "metrics.ndjson")


def file_of(run, name):
    if name in ("checkpoint.pt", "metadata.json", "run_manifest.json"):
        return run / "epoch-0003" / name
    return run / ".codex" / name if name == "metrics.ndjson" else run / name


@pytest.mark.parametrize("name", FILES)
def test_a_resumed_run_comes_to_the_same_hash_over_any_damage(name, trained, zygote, scratch, full, rng, tally):
    source, expected = trained
    path = file_of(source, name)
    assert path.exists()
    content, same, refusals = path.read_bytes(), 0, 0
    ways = [*chosen(flips(content, True, 1), 250 if full else 4, rng), *chosen(cuts(content, True, 1), 60 if full else 2, rng)]
    for what, spoilt in [*ways, *chosen(replaced(content, rng), 9 if full else 1, rng)]:
        run = shutil.copytree(source, scratch / "run")
        file_of(run, name).write_bytes(spoilt)
        try:
            result = zygote.run(folder=str(run), epochs=4)
        except RuntimeError as error:  # told, and nothing trained on another configuration
            assert "CheckpointError" in str(error) and "another configuration" in str(error), f"{what}: {error}"
            assert name in ("metadata.json", "config.resolved.json"), f"{what}: {error}"
            refusals += 1
        else:
            assert result["checkpoint_sha256_last"] == expected, what
            same += 1
        shutil.rmtree(run)
    tally("damage", f"{name} of a real run, then a resume", resumed_to_the_same_hash=same, refused_with_a_reason=refusals, silent=0)


def test_a_damaged_tokenizer_is_not_trained_on(scratch, full, rng, tally):
    (scratch / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)

    def text_run(folder, epochs):
        return run_training(model="tiny", data=str(scratch / "text.txt"), epochs=epochs, steps_per_epoch=2, block_size=16, threads=1,
                            tokenizer="bpe" if have("tokenizers") else "byte", vocab_size=270, progress="off", checkpoint_dir=str(folder),
                            resume=True)

    text_run(scratch / "whole", 1)
    expected = text_run(scratch / "longer", 2)["checkpoint_sha256_last"]
    content, same, refusals = (scratch / "whole" / "tokenizer.json").read_bytes(), 0, 0
    ways = [*chosen(flips(content, True, 1), 400 if full else 8, rng), *chosen(cuts(content, True, 1), 50 if full else 2, rng)]
    for what, spoilt in [*ways, *chosen(replaced(content, rng), 9 if full else 2, rng)]:
        run = shutil.copytree(scratch / "whole", scratch / "run")
        (run / "tokenizer.json").write_bytes(spoilt)
        try:
            result = text_run(run, 2)
        except (CheckpointError, DataError):
            refusals += 1
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        else:
            assert result["checkpoint_sha256_last"] == expected, what
            same += 1
        shutil.rmtree(run)
    tally("damage", "tokenizer.json of a real run, then a resume", resumed_to_the_same_hash=same, refused_with_a_reason=refusals, silent=0)


def have(package):
    import importlib.util

    return importlib.util.find_spec(package) is not None


# ---- metrics


def test_metrics_that_are_torn_anywhere_lose_the_last_line_only(scratch, full, tally):
    path, size = scratch / "metrics.ndjson", 0
    writer, ends = NdjsonWriter(path), [0]
    for step in range(8):
        writer.emit(scalar_record("r", step, "train", "loss", 0.5 * step))
        ends.append(path.stat().st_size)
    writer.close()
    content, expected = path.read_bytes(), read_ndjson(path)[0]
    for size in range(0, len(content), 1 if full else 7):
        path.write_bytes(content[:size])
        whole = sum(end <= size for end in ends[1:])
        records, torn = read_ndjson(path)
        bare = size + 1 in ends  # but for its line break the line is whole
        assert records == expected[:whole + bare], size
        assert torn == (0 if size in ends or bare else 1), size
        writer = NdjsonWriter(path)
        writer.emit(expected[-1])
        writer.close()
        assert read_ndjson(path) == ([*records, expected[-1]], torn), size
    tally("damage", "metrics.ndjson, cut at every length", last_line_lost_and_counted=size + 1 if full else len(range(0, len(content), 7)),
          silent=0)


def test_the_states_of_these_tests_differ():
    """Else a swapped file could not be told."""
    from scenarios import state_of

    states = [state_of(name)["model"]["w"] for name in (*EPOCHS, "step-00000034", "step-00000037")]
    assert all(not torch.equal(a, b) for i, a in enumerate(states) for b in states[:i])
