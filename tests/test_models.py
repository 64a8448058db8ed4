"""Reference models, building them from data and configuration, and sampling that leaves no trace."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from codex_ml.models import GPT, MLP, ModelError, build_model, generate
from codex_ml.registry import ArgumentError, UnknownName
from codex_ml.seeding import set_seed
from codex_ml.tokenizers import ByteTokenizer

TEXT = {"vocab_size": 256, "block_size": 16}
TABLE = {"in_features": 4, "out_features": 3}


def test_attention_is_causal_at_every_position():
    set_seed(3)
    model = GPT(11, 9, dim=16, layers=2, heads=4).eval()
    tokens = torch.randint(11, (2, 9))
    for t in range(9):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        same = (model(tokens) == model(changed)).all(-1).all(0)
        assert same[:t].all() and not same[t]


def test_a_token_means_something_else_at_every_position():
    logits = GPT(11, 9, dim=16, layers=1, heads=1)(torch.zeros(1, 9, dtype=torch.long))[0]
    assert len({tuple(row.tolist()) for row in logits}) == 9


def test_residual_projections_start_smaller_and_the_vocabulary_is_stored_once():
    set_seed(1)
    model = GPT(256, 64, dim=128, layers=8, heads=4)
    assert model.blocks[0].out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.blocks[0].qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert sum(tuple(v.shape) == (256, 128) for v in model.state_dict().values()) == 1
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith("bias"))


def test_dropout_acts_in_training_only_and_none_draws_nothing():
    for model, x in ((GPT(9, 8, 16, 1, 2, dropout=0.5), torch.zeros(1, 8, dtype=torch.long)),
                     (MLP(4, 3, dropout=0.5), torch.ones(2, 4))):
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), model(x))
    before = torch.get_rng_state()
    model = GPT(9, 8, 16, 1, 2)
    state = torch.get_rng_state()
    assert not torch.equal(before, state)
    model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    assert torch.equal(state, torch.get_rng_state())


def test_one_token_and_a_full_block_fit_and_more_does_not():
    model = GPT(9, 4, 16, 1, 2)
    assert model(torch.zeros(3, 1, dtype=torch.long)).shape == (3, 1, 9)
    with pytest.raises(ModelError, match="5 tokens in a row.*block_size=4"):
        model(torch.zeros(1, 5, dtype=torch.long))


@pytest.mark.parametrize("x", [torch.zeros(4, dtype=torch.float64), torch.zeros(4, 1, 1), torch.zeros(4, 1, dtype=torch.int16)])
def test_mlp_takes_any_shape_and_number_type(x):
    assert MLP(1, 2, hidden=())(x).shape == (4, 2)


@pytest.mark.parametrize(("args", "said"), [
    ({"heads": 3}, "multiple of heads"), ({"layers": 0}, "at least 1"), ({"dim": "wide"}, "dim='wide'"),
    ({"dim": 64.0}, "dim=64.0"), ({"dropout": 1.5}, "dropout"), ({"dropout": -0.1}, "dropout"), ({"heads": 0}, "heads"),
])
def test_bad_values_from_the_configuration_are_model_errors(args, said):
    with pytest.raises(ModelError, match=said):
        build_model("gpt", TEXT, args)


def test_building_by_name_class_function_and_instance():
    assert isinstance(build_model("TINY", TEXT, {}), GPT) and isinstance(build_model("tiny", TABLE, {}), MLP)
    assert isinstance(build_model(MLP, TABLE, {"hidden": [8]}), MLP)
    assert build_model("gpt", TEXT, {"dim": 8, "vocab_size": 300, "heads": 1}).token.weight.shape == (300, 8)
    module = nn.Linear(2, 2)
    assert build_model(module, TABLE, {}) is module
    with pytest.raises(ModelError, match="already built"):
        build_model(module, TABLE, {"dim": 3})


def test_what_is_wrong_with_a_builder_is_said():
    with pytest.raises(UnknownName, match="did you mean 'gpt'"):
        build_model("gtp", TEXT, {})
    with pytest.raises(ArgumentError, match="model_args.hiden: 'mlp' does not take it: did you mean 'hidden'"):
        build_model("mlp", TABLE, {"hiden": [3]})
    with pytest.raises(ModelError, match="needs vocab_size, block_size, and these data tell only in_features"):
        build_model("gpt", TABLE, {})
    with pytest.raises(ModelError, match="needs size, and these data tell only nothing"):
        build_model(lambda size: nn.Linear(size, 1), {}, {})
    with pytest.raises(ModelError, match="neither pair"):
        build_model("tiny", {}, {})
    with pytest.raises(ModelError, match="returned int"):
        build_model(lambda: 3, {}, {})
    with pytest.raises(ModelError, match="is no model"):
        build_model(3, {}, {})


def test_errors_of_the_users_own_builder_pass_through():
    def broken():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        build_model(broken, {}, {})


def test_a_builder_with_open_keywords_gets_what_the_user_said():
    made = {}

    def builder(**args):
        made.update(args)
        return nn.Linear(1, 1)

    build_model(builder, TEXT, {"anything": 1})
    assert made == {"anything": 1}


class Noisy(nn.Module):
    "Draws from every global generator when it is called; one part is frozen in eval mode."

    def __init__(self, fail=False):
        super().__init__()
        self.inner, self.frozen, self.fail = nn.Linear(1, 1), nn.Dropout(0.5), fail
        self.frozen.eval()

    def forward(self, tokens):
        random.random(), np.random.rand()
        if self.fail:
            raise OSError("stopped")
        return torch.rand(*tokens.shape, 256)


@pytest.mark.parametrize("fail", [False, True])
def test_sampling_leaves_random_state_and_modes_as_they_were(fail):
    set_seed(5)
    model = Noisy(fail)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    try:
        generate(model, ByteTokenizer(), "x", 3)
    except OSError:
        assert fail
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert model.training and model.inner.training and not model.frozen.training


def test_sampling_is_a_function_of_the_seed_and_outgrows_the_block():
    set_seed(1)
    model = build_model("tiny", TEXT, {})
    a, b, c = (generate(model, ByteTokenizer(), "abc", 40, seed=seed) for seed in (1, 1, 2))
    assert a == b != c and a.startswith("abc")
    assert generate(model, ByteTokenizer(), "abc", 0) == "abc"
    assert len(generate(model, ByteTokenizer(), "", 5, top_k=0).encode(errors="replace")) >= 5
    assert generate(model, ByteTokenizer(), "abc", 5, top_k=1) == generate(model, ByteTokenizer(), "abc", 5, temperature=0)
    with pytest.raises(ValueError, match="must not be negative"):
        generate(model, ByteTokenizer(), "abc", 5, temperature=-1)
