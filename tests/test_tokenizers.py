"""Exact round trips for any text, and a vocabulary that is a function of the corpus alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_ml import tokenizers
from codex_ml.tokenizers import BPETokenizer, ByteTokenizer, TokenizerError, load_tokenizer, train_tokenizer

CORPUS = [Path(module.__file__).read_text(encoding="utf-8") for module in (tokenizers, os)]
BPE = BPETokenizer.train(CORPUS, 600)
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text(st.sampled_from("ab1 \n\t\r'(\u00a0\u2028\x1c"))


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["byte", "bpe"])
@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_any_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == (np.uint8 if tokenizer.name == "byte" else np.uint16)
    assert not len(ids) or int(ids.max()) < tokenizer.vocab_size


@settings(max_examples=300, deadline=None)
@given(text=TEXT, size=st.integers(1, 8))
def test_cutting_a_text_into_pieces_changes_no_token(text, size):
    pieces = list(tokenizers._pieces(text, size))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in BPE.model.encode(piece).ids] == BPE.model.encode(text).ids


def test_a_long_text_has_the_tokens_of_its_whole_and_many_are_like_one():
    long = CORPUS[1] * 4
    assert len(list(tokenizers._pieces(long))) > 1
    assert BPE.encode(long).tolist() == BPE.model.encode(long).ids
    many = BPE.encode_many(["", long, "x", ""])
    assert [len(ids) for ids in many] == [0, len(BPE.encode(long)), 1, 0]
    assert BPE.encode_many([]) == []


@pytest.mark.parametrize("parallel", ["true", "false", None])
def test_training_gives_one_vocabulary_in_every_process(parallel):
    code = ("import json, os, pathlib, codex_ml.tokenizers as t\n"
            "texts = [pathlib.Path(m.__file__).read_text(encoding='utf-8') for m in (t, os)]\n"
            "print(json.dumps(t.BPETokenizer.train(texts, 600).to_json()))")
    env = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"} | {"PYTHONHASHSEED": "random"}
    env |= {"TOKENIZERS_PARALLELISM": parallel} if parallel else {}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == BPE.to_json()


def test_the_saved_form_is_json_and_comes_back_equal():
    for tokenizer in (ByteTokenizer(), BPE):
        saved = json.dumps(tokenizer.to_json())
        again = load_tokenizer(json.loads(saved))
        assert json.dumps(again.to_json()) == saved and again.vocab_size == tokenizer.vocab_size
        assert again.encode(CORPUS[0]).tolist() == tokenizer.encode(CORPUS[0]).tolist()


@pytest.mark.parametrize("saved", [{}, [], {"name": 1}, {"name": "bpe"}, {"name": "bpe", "model": 3},
                                   {"name": "bpe", "model": {"model": {}}}])
def test_a_broken_saved_tokenizer_is_an_error_of_ours(saved):
    with pytest.raises(TokenizerError):
        load_tokenizer(saved)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["byte", "bpe"])
def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("a\ud800")


def test_small_corpora_and_small_vocabularies():
    assert BPETokenizer.train([], 300).vocab_size == BPETokenizer.train(["abc"], 300).vocab_size == 256
    with pytest.raises(TokenizerError, match="256"):
        train_tokenizer("bpe", CORPUS, 255)


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match=r"pip install 'codex_ml\[bpe\]'"):
        train_tokenizer("bpe", CORPUS, 300)


def test_arrays_can_be_written_to():
    for tokenizer in (ByteTokenizer(), BPE):
        tokenizer.encode("text")[0] = 1
