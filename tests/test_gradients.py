"""Gradients that are not of the update under way make no difference, whoever left them there, and a resume does not need them."""

import torch
from torch import nn

from codex_ml.train_loop import run_training

X, Y = torch.randn(30, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(30, 2)


class Stop:
    def __init__(self, step):
        self.step = step

    def on_step_end(self, step, state):
        if step == self.step:
            state.request_stop()


def backward(model):
    model(X).square().sum().backward()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))


def run(folder, model=None, optimizer="sgd", stop=None, **more):
    model = model or net()
    optimizer = optimizer(model) if callable(optimizer) else optimizer
    callbacks = [Stop(stop)] if stop else []
    return run_training(model=model, optimizer=optimizer, data=(X, Y), batch_size=8, epochs=2, grad_clip=0.01, progress="off",
                        metrics_out=None, checkpoint_dir=folder, callbacks=callbacks, **more)


def stopped_and_resumed(folder, stop, **more):
    assert run(folder, stop=stop, **more)["status"] == "stopped"
    return run(folder, resume=True, **more)["checkpoint_sha256_last"]


def test_an_optimizer_of_a_part_of_the_model(tmp_path):
    """The gradients of the rest would add up from step to step, and count in the clipping."""
    part = {"optimizer": lambda model: torch.optim.SGD(model[1].parameters(), lr=0.1)}
    whole = run(tmp_path / "whole", **part)["checkpoint_sha256_last"]
    for stop in (2, 4, 5):
        assert stopped_and_resumed(tmp_path / f"{stop}", stop, **part) == whole


def test_an_evaluation_that_takes_gradients(tmp_path):
    def evaluate(epoch, state):
        backward(state.model)
        return {"norm": state.model[0].weight.grad.norm()}

    whole = run(tmp_path / "whole", eval_fn=evaluate)["checkpoint_sha256_last"]
    assert stopped_and_resumed(tmp_path / "resumed", 4, eval_fn=evaluate) == whole == run(tmp_path / "without")["checkpoint_sha256_last"]


def test_gradients_that_the_caller_left(tmp_path):
    used = net()
    backward(used)
    assert run(tmp_path / "used", model=used)["checkpoint_sha256_last"] == run(tmp_path / "fresh")["checkpoint_sha256_last"]


def test_gradients_inside_a_window_are_kept(tmp_path):
    whole = run(tmp_path / "whole", grad_accum=3)["checkpoint_sha256_last"]
    for stop in (1, 2, 4, 6):
        assert stopped_and_resumed(tmp_path / f"{stop}", stop, grad_accum=3) == whole


def test_a_callback_sees_the_gradients_of_the_update(tmp_path):
    norms = []

    class Watch:
        def on_step_end(self, step, state):
            norms.append(state.model[1].weight.grad.norm().item())

    result = run_training(model=net(), data=(X, Y), batch_size=8, epochs=1, progress="off", metrics_out=None, callbacks=[Watch()])
    assert not result["callback_errors"] and len(norms) == 4 and all(norm > 0 for norm in norms)
