"""Optimizers from names, classes, functions and instances; fused only where the fused kernel can work."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from codex_ml.optimizers import OptimizerError, build_optimizer
from codex_ml.registry import ArgumentError, UnknownName


def build(optimizer, model=None, **args):
    return build_optimizer(optimizer, model or nn.Linear(3, 2), learning_rate=0.1, weight_decay=0.01, args=args)


@pytest.mark.parametrize("name", ["adamw", "Adam", "SGD"])
def test_fused_and_plain_train_alike(name):
    def trained(**args):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = build(name, model, **args)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.arange(6.0).view(2, 3)).square().mean().backward()
            optimizer.step()
        return optimizer.defaults["fused"], torch.cat([p.flatten() for p in model.parameters()])

    (fused, a), (plain, b) = trained(), trained(fused=False)
    assert fused and not plain and torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_no_fusion_where_it_cannot_work():
    mixed = nn.Linear(3, 2)
    mixed.extra = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    for model in (nn.Embedding(5, 2, sparse=True), mixed, nn.Linear(3, 2, device="meta")):
        assert not build("sgd", model).defaults["fused"]
    assert not build("adamw", foreach=True).defaults["fused"]
    sparse = nn.Embedding(5, 2, sparse=True)
    optimizer = build_optimizer("sgd", sparse, learning_rate=0.1)
    sparse(torch.tensor([1])).sum().backward()
    optimizer.step()


def test_a_frozen_complex_parameter_does_not_stop_fusion():
    model = nn.Linear(3, 2)
    model.frozen = nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False)
    optimizer = build("adamw", model)
    assert optimizer.defaults["fused"] and len(optimizer.param_groups[0]["params"]) == 2


def test_settings_reach_the_optimizer():
    group = build(RMSprop, alpha=0.9).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["alpha"]) == (0.1, 0.01, 0.9)
    assert build("sgd", momentum=0.9).param_groups[0]["momentum"] == 0.9
    assert build("adam", betas=[0.8, 0.9]).param_groups[0]["betas"] == (0.8, 0.9)
    assert build(lambda params, lr: SGD(params, lr)).param_groups[0]["weight_decay"] == 0
    assert build(lambda params, **kw: SGD(params, **kw)).param_groups[0]["lr"] == 0.1


def test_an_instance_is_taken_as_it_is():
    model = nn.Linear(3, 2)
    mine = Adam(model.parameters(), lr=7.0)
    assert build(mine, model) is mine and mine.param_groups[0]["lr"] == 7.0
    with pytest.raises(OptimizerError, match="already built"):
        build(mine, model, eps=1)
    with pytest.raises(OptimizerError, match="none of this model's parameters"):
        build(mine)


def test_every_mistake_names_what_was_typed():
    with pytest.raises(UnknownName, match="did you mean 'adamw'"):
        build("admw")
    with pytest.raises(ArgumentError, match="optimizer_args.beta: 'adamw' does not take it: did you mean 'betas'"):
        build("adamw", beta=0.9)
    with pytest.raises(ArgumentError, match="AdamW does not take it"):
        build(AdamW, momentum=0.9)
    with pytest.raises(ArgumentError, match="optimizer_args.params"):
        build("adamw", params=[])
    for key in ("lr", "weight_decay"):
        with pytest.raises(OptimizerError, match=f"optimizer_args.{key} has a key of its own"):
            build("adamw", **{key: 1})
    with pytest.raises(OptimizerError, match="Invalid beta"):
        build("adamw", betas=[2, 0.9])
    with pytest.raises(OptimizerError, match="cannot be built"):
        build("adamw", betas="many")
    with pytest.raises(OptimizerError, match="nothing to train"):
        build("adamw", nn.ReLU())
    with pytest.raises(OptimizerError, match="is no optimizer"):
        build(3)
    with pytest.raises(OptimizerError, match="not a torch.optim.Optimizer"):
        build(lambda params, lr: 3)


def test_errors_of_the_users_own_function_pass_through():
    def broken(params, lr):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="^mine$"):
        build(broken)
