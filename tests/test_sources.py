"""Whatever a user may call data: taken as meant, or refused with the fix."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from codex_ml import registry, tokenizers
from codex_ml.corpus import Corpus
from codex_ml.data import DataError, TensorSamples, TokenWindows
from codex_ml.registry import UnknownName, register
from codex_ml.sources import Data, open_data, unigram_perplexity


class Squares(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return torch.tensor([float(i)]), torch.tensor([float(i * i)])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class Anew:
    def __iter__(self):
        return iter([torch.zeros(2, 3)] * 4)


class Endless(Dataset):
    def __getitem__(self, i):
        return i


def text(folder, documents, suffix=".txt"):
    for i, document in enumerate(documents):
        (folder / f"{i:04}{suffix}").write_text(document)
    return str(folder)


# tensors, arrays, data sets, iterables

def test_tensors_and_arrays():
    x, y = torch.rand(6, 2, 3), np.array([0, 1, 2, 0, 1, 4])
    opened = open_data((x, y))
    assert opened.spec == {"in_features": 6, "out_features": 5} and opened.valid is None and opened.tokenizer is None
    assert opened.train.tensors[1].dtype == torch.int64 and opened.train.tensors[0] is not None
    assert isinstance(open_data(x).train.gather(torch.tensor([1])), torch.Tensor)
    assert open_data((x, y), (x[:2], y[:2])).valid.tensors[0].shape == (2, 2, 3)


def test_arrays_of_float64_become_float32_and_tensors_stay():
    assert open_data(np.zeros((3, 2))).train.tensors[0].dtype == torch.float32
    assert open_data(torch.zeros(3, 2, dtype=torch.float64)).train.tensors[0].dtype == torch.float64
    assert open_data(np.zeros((3, 2), np.uint8)).train.tensors[0].dtype == torch.uint8


def test_arrays_as_they_come(tmp_path, recwarn):
    base = np.arange(12, dtype=np.float32).reshape(6, 2)
    np.save(tmp_path / "x.npy", base)
    for array in (base[::-1], base[:, ::-1], np.asfortranarray(base), np.load(tmp_path / "x.npy", mmap_mode="r")):
        assert torch.equal(open_data(array).train.tensors[0], torch.from_numpy(array.copy()))
    assert not recwarn.list
    needs_grad = torch.zeros(3, 1, requires_grad=True)
    assert not open_data(needs_grad).train.tensors[0].requires_grad


@pytest.mark.parametrize(("data", "said"), [
    ((torch.zeros(3, 2), torch.zeros(4)), r"\(3, 2\), \(4,\)"), (torch.tensor(1.0), "a single number"),
    ((torch.zeros(3), np.ones(())), "a single number"),
    ((torch.zeros(3, 1), [1, 2, 3]), "make all of them"), (torch.zeros(0, 3), r"empty.*\(0, 3\)"),
    (np.array(["a", "b"]), "cannot become a tensor"), (np.array([object()]), "cannot become a tensor"),
    ([], "empty"), ((), "empty"), ([torch.zeros(5, 3), torch.zeros(5)], "give a tuple"), ({"x": torch.zeros(3)}, "give a tuple"),
    (iter([1, 2]), "only once"), ((i for i in range(3)), "only once"), (map(abs, [1]), "only once"), (Stream(), "wrap it, DataLoader"),
    (Endless(), "__len__"), (3, "is no data"), (Anew, r"Anew is a class: call it"), (lambda: 1, "is no data")])
def test_what_cannot_work_is_refused_with_the_fix(data, said):
    with pytest.raises(DataError, match=said):
        open_data(data)
    with pytest.raises(DataError, match=said):
        open_data(torch.zeros(3, 3), data)


def test_datasets_and_iterables_stay_what_they_are():
    for data in (Squares(), Anew(), [torch.zeros(2, 3)] * 2, DataLoader(Squares(), batch_size=2), DataLoader(Stream())):
        assert open_data(data).train is data and open_data(data).spec == {}


def test_opening_a_loader_starts_no_worker_and_draws_nothing():
    loader = DataLoader(Squares(), batch_size=2, num_workers=1, shuffle=True)
    before = torch.get_rng_state()
    open_data(loader)
    assert torch.equal(before, torch.get_rng_state()) and loader._iterator is None


def test_a_tensor_dataset_is_gathered_by_row_and_a_subclass_is_not():
    class Noisy(TensorDataset):
        def __getitem__(self, i):
            return torch.rand(1), torch.rand(1)

    tensors = torch.rand(4, 2), torch.arange(4)
    assert isinstance(open_data(TensorDataset(*tensors)).train, TensorSamples)
    for data in (Noisy(*tensors), TensorDataset(tensors[0])):
        assert open_data(data).train is data


# fingerprints

def test_a_fingerprint_sees_every_bit_type_shape_and_order():
    x = torch.arange(24.0).view(4, 6)
    flipped = x.clone()
    flipped.view(torch.int32)[3, 5] ^= 1
    variants = [x, flipped, x.view(6, 4), x.double(), x.to(torch.bfloat16), x.bool(), torch.complex(x, x), x.to(torch.uint16)]
    prints = [open_data(v).fingerprint for v in variants] + [open_data((x, x)).fingerprint]
    assert len(set(prints)) == len(prints) and all(p.startswith("sha256:") for p in prints)
    assert open_data(x.t().contiguous().t()).fingerprint == prints[0]


def test_a_fingerprint_is_one_in_every_process(tmp_path):
    where = text(tmp_path, ["some text\n" * 50] * 3)
    code = (f"from codex_ml.sources import open_data; print(open_data({where!r}, block_size=8).fingerprint)\n"
            f"print(open_data({where!r}, tokenizer='bpe', vocab_size=270, block_size=8).fingerprint)")
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(runs) == 1 and len(set(runs.pop().split())) == 2


def test_what_decides_the_bits_of_a_text_changes_its_fingerprint(tmp_path):
    where = text(tmp_path, ["some text\n" * 50] * 3)
    prints = [open_data(where, **args).fingerprint for args in (
        {"block_size": 8}, {"block_size": 9}, {"block_size": 8, "eval_fraction": 0.2},
        {"block_size": 8, "tokenizer": "bpe", "vocab_size": 256}, {"block_size": 8, "tokenizer": "bpe", "vocab_size": 260})]
    assert len(set(prints)) == len(prints)
    assert open_data(where, where, block_size=8).fingerprint == open_data(where, block_size=8, eval_fraction=0).fingerprint


def test_code_has_no_fingerprint_but_may_have_its_own():
    assert open_data(Squares()).fingerprint == f"unknown:{__name__}.Squares:10"
    assert open_data(Anew()).fingerprint == f"unknown:{__name__}.Anew"
    signed = Squares()
    signed.fingerprint = "v7"
    assert open_data(signed).fingerprint == "v7"
    signed.fingerprint = lambda: 8
    assert open_data(signed).fingerprint == "8"


# text

def test_documents_are_joined_by_a_line_break(tmp_path):
    opened = open_data(text(tmp_path, ["abc", "def\n", "", "x"]), block_size=2, eval_fraction=0)
    assert bytes(opened.train.tokens.tolist()) == b"abc\ndef\n\n\nx" and opened.valid is None


@pytest.mark.parametrize(("tokenizer", "dtype"), [("byte", torch.uint8), ("BPE", torch.uint16)])
def test_tokens_are_small_and_windows_read_back(tmp_path, tokenizer, dtype):
    documents = [f"the story number {i} goes on\n" for i in range(40)]
    opened = open_data(text(tmp_path, documents), tokenizer=tokenizer, vocab_size=300, block_size=8)
    assert opened.train.tokens.dtype == dtype and opened.spec["vocab_size"] == opened.tokenizer.vocab_size
    assert opened.tokenizer.decode(opened.valid.tokens) == "\n".join(documents[9::10])
    x, y = opened.train.gather(torch.tensor([0, 1]))
    assert x.dtype == y.dtype == torch.int64 and torch.equal(x[:, 1:], y[:, :-1])


def test_the_tokenizer_learns_from_the_training_part_alone(tmp_path):
    documents = ["plain words here\n" * 20 if i % 10 != 9 else "zq" * 200 for i in range(40)]
    opened = open_data(text(tmp_path, documents), tokenizer="bpe", vocab_size=400, block_size=8)
    assert "zq" not in [opened.tokenizer.decode([i]) for i in range(opened.tokenizer.vocab_size)]


def test_a_saved_tokenizer_is_taken_and_none_is_trained(tmp_path, monkeypatch):
    where = text(tmp_path, ["some text and some more\n" * 20] * 3)
    first = open_data(where, tokenizer="bpe", vocab_size=280, block_size=8)
    monkeypatch.setattr(tokenizers.BPETokenizer, "train", None)
    again = open_data(where, tokenizer="byte", block_size=8, saved_tokenizer=first.tokenizer.to_json())
    assert again.fingerprint == first.fingerprint and again.tokenizer.to_json() == first.tokenizer.to_json()


def test_too_little_text_is_an_error_with_numbers(tmp_path):
    where = text(tmp_path, ["0123456789" * 4])
    with pytest.raises(DataError, match=r"the training part of .* has 36 tokens, a sample takes block_size \+ 1 = 41"):
        open_data(where, block_size=40)
    with pytest.raises(DataError, match="the validation part of .* has 4 tokens"):
        open_data(where, block_size=8)
    assert open_data(where, block_size=39, eval_fraction=0).train.gather(torch.tensor([0]))[1].shape == (1, 39)


def test_text_given_for_validation_is_used_whole(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    a, b = text(tmp_path / "a", ["a" * 100]), text(tmp_path / "b", ["b" * 50])
    opened = open_data(a, b, block_size=8)
    assert len(opened.train.tokens) == 100 and len(opened.valid.tokens) == 50
    with pytest.raises(DataError, match="one of data and eval_data is text"):
        open_data(torch.zeros(3, 3), b)
    with pytest.raises(DataError, match="one of data and eval_data is text"):
        open_data(a, torch.zeros(3, 3))


def test_unigram_perplexity_by_hand():
    train = TokenWindows(torch.tensor([0, 0, 0, 1], dtype=torch.uint8), 1, 4)
    valid = TokenWindows(torch.tensor([0, 3], dtype=torch.uint16), 1, 4)
    assert unigram_perplexity(train, valid) == pytest.approx((4 / 8 * 1 / 8) ** -0.5)


# names

@pytest.fixture
def entries(monkeypatch):
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def test_the_default_corpus_by_any_case_and_its_held_out_tenth(entries, monkeypatch):
    small = Corpus("stdlib", [f"# file {i}\n" * 9 for i in range(50)], steps_per_epoch=100, eval_steps=20)
    register("datasets", "stdlib", lambda: small, override=True)
    opened = open_data("StdLib", block_size=16)
    assert (opened.steps_per_epoch, opened.eval_steps) == (100, 20)
    assert bytes(opened.valid.tokens.tolist()).startswith(b"# file 9\n")
    assert open_data("stdlib", block_size=16, eval_fraction=0).valid is None


def test_registered_data_may_be_anything(entries, tmp_path):
    where = text(tmp_path, ["some text " * 50])
    ready = Data("ready", TensorSamples(torch.zeros(3, 1)), valid=TensorSamples(torch.ones(2, 1)), steps_per_epoch=7)
    for name, thing in {"a": Squares, "b": where, "c": lambda: (torch.zeros(4, 2), torch.zeros(4)), "d": ready,
                        "e": Corpus("tales", ["one " * 30], ["two " * 20])}.items():
        register("datasets", name, thing)
    assert isinstance(open_data("a").train, Squares) and open_data("a").name == "a"
    assert open_data("b", block_size=8).name == where
    assert open_data("c").spec == {"in_features": 2, "out_features": 1}
    assert open_data("d") is ready and open_data(torch.zeros(2, 1), "d").valid is ready.valid
    assert open_data("d", torch.ones(5, 1)).steps_per_epoch == 7 and len(open_data("d", torch.ones(5, 1)).valid) == 5
    assert len(open_data("e", block_size=8).valid.tokens) == 80


def test_a_folder_beside_a_registered_name(tmp_path, monkeypatch, entries):
    (tmp_path / "stdlib").mkdir()
    where = text(tmp_path / "stdlib", ["mine " * 40])
    monkeypatch.chdir(tmp_path)
    assert len(open_data("./stdlib", block_size=8).train.tokens) < 300
    assert open_data(tmp_path / "stdlib", block_size=8).name == where  # a Path is never a name


def test_an_unknown_tokenizer_gets_a_hint(tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'byte'"):
        open_data(text(tmp_path, ["some text " * 50]), tokenizer="bytes", block_size=8)
