"""Where two runs part. A hundred causes are planted, one in each second run, and each has to be named, with its step."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from codex_ml import provenance
from codex_ml.checkpoint import list_checkpoints, load_checkpoint, serialize
from codex_ml.cli.main import main
from codex_ml.data import Order
from codex_ml.durable import sha256_file
from codex_ml.fingerprints import digits, fold
from codex_ml.first_difference import NothingToCompare, first_difference
from codex_ml.recorded_steps import NoRun
from codex_ml.train_loop import run_training
from codex_ml.utils.determinism import environment_fingerprint

SAMPLES, FEATURES, BATCH, SEED = 30, 6, 10, 1234
TENSORS = ("layers.0.weight", "layers.0.bias", "layers.3.weight", "layers.3.bias")
generator = torch.Generator().manual_seed(5)
X, Y = torch.randn(SAMPLES, FEATURES, generator=generator), torch.randint(0, 3, (SAMPLES,), generator=generator)


class Net(nn.Module):
    """A small network whose forward pass can be told to do a little else, from some call on."""

    def __init__(self, dropout: float = 0.0, scale: float = 1.0, since: int = 1, activation: Callable[[], nn.Module] = nn.ReLU):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 8), activation(), nn.Dropout(dropout), nn.Linear(8, 3))
        self.scale, self.since, self.calls = scale, since, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return self.layers(x) * (self.scale if self.calls >= self.since else 1.0)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Table(Dataset):
    """The samples one by one, without a fingerprint of their own; one of them can be another, or its place another's."""

    def __init__(self, spoilt: int | None = None, label: int | None = None, swapped: tuple[int, int] | None = None):
        self.x, self.y = X.clone(), Y.clone()
        if spoilt is not None:
            self.x[spoilt, 3] += 1e-6
        if label is not None:
            self.y[label] = (self.y[label] + 1) % 3
        if swapped:
            a, b = swapped
            self.x[[a, b]], self.y[[a, b]] = self.x[[b, a]], self.y[[b, a]]

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[i], self.y[i]


def batches(change: Callable[[list], Any] = lambda made: None) -> list:
    made = [[X[i:i + BATCH].clone(), Y[i:i + BATCH].clone()] for i in range(0, SAMPLES, BATCH)]
    change(made)
    return made


def own_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def other_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=1e-3)


def flipped(name: str, bit: int) -> Callable[[], nn.Module]:
    """A network with one bit of one weight the other way round."""
    def make() -> nn.Module:
        net = Net()
        net.get_parameter(name).data.view(torch.int32).view(-1)[1] ^= -2**31 if bit == 31 else 1 << bit
        return net
    return make


def hooked(at: int) -> Callable[[], nn.Module]:
    """A network whose gradient is a little larger at one step."""
    def make() -> nn.Module:
        net, calls = Net(), []
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return gradient * 1.001 if len(calls) == at else gradient
        net.get_parameter("layers.3.weight").register_hook(hook)
        return net
    return make


class After:
    """A callback that does something to the state after a step."""

    def __init__(self, step: int, do: Callable[[Any], Any]):
        self.at, self.do = step, do

    def on_step_end(self, step: int, state: Any) -> None:
        if step == self.at:
            self.do(state)


def rate(state: Any) -> None:
    state.optimizer.param_groups[0]["lr"] *= 1.5


def moment(name: str) -> Callable[[Any], Any]:
    def do(state: Any) -> None:
        state.optimizer.state[state.model.get_parameter(name)]["exp_avg"].mul_(2)
    return do


def buffer(state: Any) -> None:
    state.model.get_buffer("layers.1.running_mean").view(torch.int32)[2] ^= 1 << 20


def weight(state: Any) -> None:
    state.model.get_parameter("layers.0.weight").data.view(torch.int32).view(-1)[0] ^= 1 << 22


FAMILIES: dict[str, dict[str, Any]] = {
    "table": {"model": Net, "data": (X, Y)},
    "named": {"model": "mlp", "model_args": {"hidden": [8], "dropout": 0.1}, "data": (X, Y)},
    "linear": {"model": "mlp", "model_args": {"hidden": [8]}, "data": (X, Y), "scheduler_type": "linear", "epochs": 3},
    "stepped": {"model": "mlp", "model_args": {"hidden": [8]}, "data": (X, Y), "scheduler_type": "step", "epochs": 3},
    "clipped": {"model": Net, "data": (X, Y), "grad_clip": 0.5},
    "momentum": {"model": Net, "data": (X, Y), "optimizer": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9)},
    "own loss": {"model": Net, "data": (X, Y), "loss_fn": own_loss},
    "normed": {"model": Normed, "data": (X, Y)},
    "set": {"model": Net, "data": Table()},
    "batches": {"model": Net, "data": batches()},
    "text": {"model": "tiny", "block_size": 16},
}


@dataclass
class Case:
    """A change to a family's run, and what has to be named."""
    family: str
    kind: str
    name: str | None = None
    step: int | None = None
    change: dict[str, Any] = field(default_factory=dict)
    surroundings: dict[str, Any] = field(default_factory=dict)  # as the environment would tell of them
    variables: dict[str, str] = field(default_factory=dict)
    text: Callable[[str], str] | None = None
    manifest: dict[str, Any] = field(default_factory=dict)  # put into the manifests afterwards
    also: Callable[[pytest.MonkeyPatch], Any] | None = None

    @property
    def id(self) -> str:
        given = self.change or self.surroundings or self.variables or self.manifest
        return f"{self.kind}-{self.name}-{self.family}-{'-'.join(given)}-{self.step}"


def first_step_of(sample: int) -> int:
    return next(s for s, (_, samples) in enumerate(Order(SAMPLES, BATCH, SEED).steps(1), 1) if sample in samples)


def config(family: str, name: str, value: Any, key: str | None = None) -> Case:
    return Case(family, "configuration", name, change={(key or name).replace(".", "_"): value})


def planted() -> Iterator[Case]:
    for name, value in (("seed", 7), ("learning_rate", 2e-3), ("learning_rate", 1.0000001e-3), ("weight_decay", 0.02),
                        ("weight_decay", 0.0), ("grad_clip", 0.1), ("grad_accum", 2), ("batch_size", 5), ("batch_size", 20),
                        ("steps_per_epoch", 2), ("optimizer", "sgd"), ("optimizer", "adam"),
                        ("scheduler.type", "linear"), ("scheduler.type", "cosine"),
                        ("scheduler.warmup", 2)):
        yield config("named", name, value)
    for name, value in (("dropout", 0.2), ("dropout", 0.0), ("hidden.0", [9])):
        yield config("named", f"model_args.{name}", {"hidden": [8], "dropout": 0.1} | {name.split(".")[0]: value}, "model_args")
    for name, value in (("betas", [0.8, 0.999]), ("eps", 1e-6), ("amsgrad", True)):
        yield config("named", f"optimizer_args.{name}", {name: value}, "optimizer_args")
    for name, value in (("scheduler.final_lr_scale", 0.5), ("scheduler.interval", "step"), ("epochs", 4)):
        yield config("linear", name, value)
    for name, value in (("scheduler.gamma", 0.5), ("scheduler.step_size", 2)):
        yield config("stepped", name, value)
    yield config("clipped", "grad_clip", 0.25)
    yield config("clipped", "grad_clip", None)
    yield config("text", "block_size", 8)
    yield config("text", "eval_fraction", 0.3)
    yield Case("table", "configuration", "loss_fn", change={"loss_fn": other_loss})
    yield Case("table", "configuration", "model_name", change={"model": "mlp"})
    yield Case("momentum", "configuration", "optimizer_groups.0.momentum",
               change={"optimizer": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.8)})
    yield Case("momentum", "configuration", "optimizer_groups.0.nesterov",
               change={"optimizer": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9, nesterov=True)})

    other = {"model": lambda: Net(scale=1 + 2**-20)}  # what another kernel or library would do to the bits
    for name, value in (("torch", "2.10.0"), ("numpy", "1.26.0"), ("python", "3.14.1"), ("machine", "aarch64"), ("cpu_capability", "AVX2x"),
                        ("mkl", "none"), ("interop_threads", 99), ("default_dtype", "float64"), ("device.name", "another processor"),
                        ("device.driver", "550.54"), ("flags.cudnn.benchmark", "on"), ("flags.fp32.mkldnn.matmul", "bf16"),
                        ("flags.deterministic_algorithms", "on"), ("flags.attention.flash", "off"), ("kernel_env.MKL_CBWR", "AVX2"),
                        ("kernel_env.ONEDNN_MAX_CPU_ISA", "SSE41")):
        yield Case("table", "environment", name, 1, other, surroundings={name: value})
    for name, variable in (("env.PYTHONHASHSEED", "PYTHONHASHSEED"), ("env.CODEX_AUDIT", "CODEX_AUDIT"), ("git_sha", "GIT_SHA"),
                           ("kernel_env.MKL_NUM_THREADS", "MKL_NUM_THREADS"), ("kernel_env.NVIDIA_TF32_OVERRIDE", "NVIDIA_TF32_OVERRIDE")):
        yield Case("table", "environment", name, 1, other, variables={variable: "17"})
    for name, value in (("torch", "2.12.1"), ("platform", "Plan 9"), ("lock_sha256", "0" * 64), ("numpy", "2.9")):
        yield Case("table", "environment", name, 1, other, manifest={name: value})
    yield Case("table", "environment", "threads", 1, {**other, "threads": 2})

    for name, x, y in (("one value", X.index_fill(0, torch.tensor([4]), 0.0), Y), ("one bit", _bit(X), Y),
                       ("a row more", _more(X), _more(Y)),
                       ("one label", X, Y.index_fill(0, torch.tensor([3]), int(1 - Y[3].clamp(0, 1)))),
                       ("rows in another order", X.flip(0), Y.flip(0))):
        yield Case("table", "data", "fingerprint", None, change={"data": (x, y), "run_config": {"what": name}})
    yield Case("text", "data", "fingerprint", change={"run_config": {"what": "a byte"}},
               text=lambda text: text.replace("17 and", "18 and", 1))
    yield Case("text", "data", "fingerprint", change={"run_config": {"what": "a line"}}, text=lambda text: "one more\n" + text)

    for i in (0, 7, 19):
        yield Case("set", "batch", None, first_step_of(i), {"data": Table(spoilt=i)})
        yield Case("set", "batch", None, first_step_of(i), {"data": Table(label=i)})
    yield Case("set", "batch", None, min(first_step_of(2), first_step_of(9)), {"data": Table(swapped=(2, 9))})
    yield Case("batches", "batch", None, 2, {"data": batches(lambda made: made[1][0].view(-1)[5:6].mul_(1.5))})
    yield Case("batches", "batch", None, 1, {"data": batches(lambda made: made.reverse())})
    yield Case("batches", "batch", None, 3, {"data": batches(lambda made: made[2].__setitem__(1, made[2][1].flip(0)))})
    yield Case("table", "batch", None, 1, {"run_config": {"what": "order"}}, also=lambda patch: patch.setattr(Order, "at", _in_order))

    for at in (1, 2, 4):
        yield Case("table", "learning rate", None, at + 1 if at < 3 else 5, {"callbacks": [After(at, rate)]})
    for change in ({"dropout": 0.1}, {"activation": nn.GELU}, {"scale": 1.001}):
        yield Case("table", "loss", None, 1, {"model": lambda change=change: Net(**change)})
    for since in (2, 5):
        yield Case("table", "loss", None, since, {"model": lambda since=since: Net(scale=1.001, since=since)})
    yield Case("own loss", "loss", None, 1, {"loss_fn": other_loss})
    for at in (1, 3, 6):
        yield Case("table", "gradient", None, at, {"model": hooked(at)})
    for name in TENSORS:
        for bit in (0, 22, 31):
            yield Case("table", "weights", name, 0, {"model": flipped(name, bit)})
        yield Case("table", "weights", name, 4, {"callbacks": [After(3, moment(name))]})
    yield Case("normed", "weights", "layers.1.running_mean", 3, {"callbacks": [After(2, buffer)]})
    yield Case("table", "loss", None, 3, {"callbacks": [After(2, weight)]})


def _bit(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x.view(torch.int32)[11, 2] ^= 1 << 18
    return x


def _more(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x[:1]])


def _in_order(self: Order, positions: Any) -> Any:
    return positions // self.n, positions % self.n


CASES = list(planted())


def train(folder: Path, family: str, text: Callable[[str], str] | None = None, **change: Any) -> Path:
    job = {"epochs": 2, "batch_size": BATCH, "seed": SEED, "threads": 1, "progress": "off", "system_metrics_interval": 0.0,
           "fingerprint_every_steps": 1, **FAMILIES[family], **change}
    if family == "text":
        written = "".join(f"{i} and {i % 7} make {i + i % 7}\n" for i in range(60))
        folder.mkdir(parents=True)
        (folder / "text.txt").write_text(text(written) if text else written)
        job["data"] = folder / "text.txt"
    run_training(checkpoint_dir=folder / "run", **job)
    return folder / "run"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = train(tmp_path_factory.mktemp("base") / "a", family)
        return made[family]
    return base


def test_a_hundred_causes_are_planted() -> None:
    assert len(CASES) >= 100


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_cause_is_named(case: Case, bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = bases(case.family)
    for variable, value in case.variables.items():
        monkeypatch.setenv(variable, value)
    if case.surroundings:
        monkeypatch.setattr(provenance, "environment_fingerprint", lambda device: _told(environment_fingerprint(device), case.surroundings))
    if case.also:
        case.also(monkeypatch)
    run = train(tmp_path / "b", case.family, case.text, **case.change)
    if case.manifest:
        for path in run.glob("*/run_manifest.json"):
            path.write_text(json.dumps(_told(json.loads(path.read_text()), case.manifest)))
    found = first_difference(base, run)
    assert not found.same and found.cause is not None and found.exit_code == 6
    assert found.cause.kind == case.kind, str(found)
    if case.name is not None:
        assert found.cause.name == case.name, str(found)
    if case.step is not None:
        assert found.step == case.step, str(found)


def _told(facts: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`facts` with values put in, where the names are: `device.name` inside of device, `torch` inside of environment."""
    for name, value in changes.items():
        inside = facts.get("environment", facts) if name not in facts else facts
        head, _, rest = name.partition(".")
        if rest and head in inside:
            inside = inside[head]
            name = rest
        assert name in inside
        inside[name] = value
    return facts


def test_equal_runs_have_the_same_bits(bases: Callable[[str], Path], tmp_path: Path) -> None:
    for family in ("named", "set", "batches", "clipped"):
        found = first_difference(bases(family), train(tmp_path / family, family))
        assert found.same and found.cause is None and found.findings == [] and found.exit_code == 0, str(found)
        assert found.steps == 6 and found.checkpoints == 2 and found.distances == []


def test_what_changes_no_bit_is_told_as_harmless(bases: Callable[[str], Path], tmp_path: Path) -> None:
    found = first_difference(bases("table"), train(tmp_path / "b", "table", on_nan="warn"))
    assert found.same and [one.name for one in found.findings] == ["on_nan"] and "harmless" in str(found)


def test_a_resumed_run_is_the_run(bases: Callable[[str], Path], tmp_path: Path) -> None:
    stop = After(2, lambda state: state.request_stop())
    train(tmp_path / "b", "named", callbacks=[stop])
    run = train(tmp_path / "b", "named", resume=True)
    found = first_difference(bases("named"), run)
    assert found.same and found.steps == 6


def test_without_fingerprints_checkpoints_tell(tmp_path: Path) -> None:
    a = train(tmp_path / "a", "stepped", fingerprint_every_steps=0)
    b = train(tmp_path / "b", "stepped", fingerprint_every_steps=None, callbacks=[After(4, weight_of_first)])
    found = first_difference(a, b)
    assert found.step is None and found.between == (3, 6) and found.cause is not None and found.cause.kind == "weights"
    model = run_training(model="mlp", data=(X, Y), epochs=0, metrics_out=None, progress="off").model
    assert found.tensor in model.state_dict()
    assert found.distances and found.distances[0].ulp > 0


def weight_of_first(state: Any) -> None:
    next(state.model.parameters()).data.view(torch.int32).view(-1)[0] ^= 1


def test_the_distance_is_in_ulp(bases: Callable[[str], Path], tmp_path: Path) -> None:
    one = bases("table")
    two = train(tmp_path / "b", "table", learning_rate=0.0, weight_decay=0.0, model=flipped("layers.3.weight", 2))
    three = train(tmp_path / "c", "table", learning_rate=0.0, weight_decay=0.0)
    found = first_difference(two, three)
    assert found.tensor == "layers.3.weight" and found.step == 0
    distances = {one.where: one.ulp for one in found.distances}
    assert distances.get("layers.3.weight in epoch-0001", 0) >= 4 or max(distances.values()) >= 4
    assert not first_difference(one, three).same


def test_a_broken_checkpoint_is_no_reason_to_fail(bases: Callable[[str], Path], tmp_path: Path) -> None:
    run = train(tmp_path / "b", "table", model=flipped("layers.0.weight", 22))
    newest = list_checkpoints(run)[0].folder / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:-50])
    found = first_difference(bases("table"), run)
    assert found.cause is not None and found.cause.name == "layers.0.weight" and any("checkpoint.pt" in note for note in found.notes)


def test_streams_alone_can_be_compared(bases: Callable[[str], Path], tmp_path: Path) -> None:
    run = train(tmp_path / "b", "table", model=flipped("layers.0.weight", 22))
    found = first_difference(bases("table") / ".codex/metrics.ndjson", run / ".codex/metrics.ndjson")
    assert found.step == 0 and found.cause is not None and found.cause.name == "layers.0.weight"


def test_at_the_command_line(bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = train(tmp_path / "b", "table", learning_rate=0.01)
    assert main(["diff", str(bases("table")), str(run), "--json"]) == 6
    found = json.loads(capsys.readouterr().out)
    assert found["cause"]["name"] == "learning_rate" and found["step"] == 1 and found["same"] is False
    assert main(["diff", str(run), str(run)]) == 0
    assert "the same bits" in capsys.readouterr().out
    assert main(["diff", str(run), str(tmp_path / "nowhere")]) == 2
    assert main(["diff", str(run)]) == 2


def test_nothing_in_common(bases: Callable[[str], Path], tmp_path: Path) -> None:
    empty = train(tmp_path / "b", "table", epochs=0)
    with pytest.raises(NothingToCompare, match="no step and no checkpoint in common"):
        first_difference(bases("table"), empty)
    with pytest.raises(NoRun):
        first_difference(bases("table"), tmp_path)


NAMES = ("on_nan", "git_sha", "env.CODEX_AUDIT", "lock_sha256", "scheduler.gamma", "block_size")


def harmless(name: str) -> Case:
    """Something that differs between any two runs, and changes no bit of these."""
    if name in ("on_nan", "scheduler.gamma", "block_size"):
        value = {"on_nan": "warn", "scheduler.gamma": 0.5, "block_size": 7}[name]
        return Case("set", "configuration", name, change={name.replace(".", "_"): value})
    if name == "lock_sha256":
        return Case("set", "environment", name, manifest={name: "0" * 64})
    return Case("set", "environment", name, variables={{"git_sha": "GIT_SHA", "env.CODEX_AUDIT": "CODEX_AUDIT"}[name]: "17"})


REAL = {"a sample": ("batch", None, first_step_of(19), {"data": Table(spoilt=19)}),
        "a first weight": ("weights", "layers.3.bias", 0, {"model": flipped("layers.3.bias", 22)}),
        "a weight on the way": ("loss", None, 3, {"callbacks": [After(2, weight)]}),
        "a rate on the way": ("learning rate", None, 3, {"callbacks": [After(2, rate)]}),
        "a moment": ("weights", "layers.0.weight", 4, {"callbacks": [After(3, moment("layers.0.weight"))]}),
        "a gradient": ("gradient", None, 3, {"model": hooked(3)}),
        "a learning rate": ("configuration", "learning_rate", 1, {"learning_rate": 2e-3}),
        "a decay": ("configuration", "weight_decay", 1, {"weight_decay": 0.02})}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("real", REAL)
def test_what_is_harmless_does_not_stand_before_what_is_real(
        name: str, real: str, bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two things are planted, and the second is named; the first is in the report too."""
    case, (kind, cause, step, change) = harmless(name), REAL[real]
    for variable, value in case.variables.items():
        monkeypatch.setenv(variable, value)
    run = train(tmp_path / "b", "set", **case.change, **change)
    for path in run.glob("*/run_manifest.json") if case.manifest else ():
        path.write_text(json.dumps(_told(json.loads(path.read_text()), case.manifest)))
    found = first_difference(bases("set"), run)
    assert found.cause is not None and (found.cause.kind, found.step) == (kind, step), str(found)
    assert cause in (None, found.cause.name), str(found)
    other = next(one for one in found.findings if one.name == name)
    assert other.role in ("possible", "harmless") and name in str(found) and not found.notes


def test_a_real_cause_that_cannot_show_there_does_not_stand_first(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """A learning rate changes no first weight, a kernel no batch."""
    found = first_difference(bases("table"), train(tmp_path / "b", "table", learning_rate=0.01, model=flipped("layers.0.bias", 3)))
    assert found.step == 0 and found.cause is not None and found.cause.name == "layers.0.bias"
    assert any(one.name == "learning_rate" and one.role == "cause" for one in found.findings)


def test_versions_do_not_explain_a_sample(bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "environment_fingerprint", lambda device: environment_fingerprint(device) | {"torch": "2.10.0"})
    found = first_difference(bases("set"), train(tmp_path / "b", "set", data=Table(spoilt=7)))
    assert found.cause is not None and found.cause.kind == "batch" and "torch: 2.1" in str(found).replace('"', "")


def test_a_loss_that_is_not_finite_makes_on_nan_a_cause(tmp_path: Path) -> None:
    class Broken:
        def on_step_end(self, step: int, state: Any) -> None:
            if step == 2:
                state.model.get_parameter("layers.3.bias").data.fill_(float("nan"))

    a = train(tmp_path / "a", "table", on_nan="ignore", callbacks=[Broken()])
    b = train(tmp_path / "b", "table", on_nan="warn", callbacks=[Broken(), After(4, rate)])
    found = first_difference(a, b)
    assert next(one for one in found.findings if one.name == "on_nan").role == "cause", str(found)


def test_a_commit_stands_first_only_with_a_remark(bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else explains the first loss; so it may be the code, and the report says that it is not proved."""
    monkeypatch.setenv("GIT_SHA", "abc")
    monkeypatch.setenv("CODEX_AUDIT", "1")
    found = first_difference(bases("table"), train(tmp_path / "b", "table", model=lambda: Net(scale=1.001)))
    assert found.cause is not None and found.cause.name == "git_sha" and "the code may be another" in found.notes[0]


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run with one value of one tensor of one epoch's checkpoint edited, and its hash written anew."""
    def make(folder: Path, epoch: int, tensor: str, **change: Any) -> Path:
        run = train(folder, "table", epochs=3, **change)
        path = run / f"epoch-{epoch:04d}"
        state = torch.load(path / "checkpoint.pt")
        state["model"][tensor].view(torch.int32).view(-1)[1] ^= 1 << 20
        with open(path / "checkpoint.pt", "wb") as file:
            serialize(state, file)
        facts = json.loads((path / "metadata.json").read_text())
        (path / "metadata.json").write_text(json.dumps(facts | {"checkpoint_sha256": sha256_file(path / "checkpoint.pt")}))
        return run
    return make


def test_a_checkpoint_that_was_edited(edited: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps are equal, and the epochs after it: neither a commit nor a rate is why."""
    a = train(tmp_path / "a", "table", epochs=3)
    monkeypatch.setenv("GIT_SHA", "abc")
    for fingerprints in (1, 0):
        run = edited(tmp_path / f"b{fingerprints}", 2, "layers.3.bias", fingerprint_every_steps=fingerprints, on_nan="warn")
        found = first_difference(a, run)
        assert found.cause is not None and (found.cause.kind, found.cause.name) == ("weights", "layers.3.bias"), str(found)
        assert found.tensor == "layers.3.bias" and "epoch-0002 differs, and what came after it is equal" in found.notes[0]
        state = load_checkpoint(next(c for c in list_checkpoints(a) if c.name == "epoch-0002"))
        assert found.cause.here == digits(int(fold(state["model"]["layers.3.bias"]))) != found.cause.there


def test_the_tensor_that_is_farthest_is_named(tmp_path: Path) -> None:
    """After the step in which all tensors came to differ, the one that was changed is farthest."""
    def change(state: Any) -> None:
        state.model.get_parameter("layers.3.bias").data[0] += 40.0

    slow = {"learning_rate": 1e-4, "fingerprint_every_steps": 5}
    a, b = train(tmp_path / "a", "table", **slow), train(tmp_path / "b", "table", **slow, callbacks=[After(2, change)])
    found = first_difference(a, b)
    assert found.step == 3 and found.tensor == "layers.3.bias", str(found)
    weights = next(one for one in found.findings if one.kind == "weights")
    assert weights.name == "layers.3.bias" and weights.step == 5 and weights.here != weights.there and len(weights.here) == 16
