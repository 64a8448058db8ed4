"""PyTorch training that stops anywhere, goes on from anywhere, and can be proved afterwards.

`import codex_ml` is cheap: a public name is imported from its module when it is first used, and torch with it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module that defines it
_PUBLIC = {
    "list_checkpoints": "codex_ml.checkpoint",
    "load_checkpoint": "codex_ml.checkpoint",
    "verify_checkpoint": "codex_ml.checkpoint",
    "CheckpointConfig": "codex_ml.config",
    "ReproducibilityConfig": "codex_ml.config",
    "RetentionConfig": "codex_ml.config",
    "SchedulerConfig": "codex_ml.config",
    "MonitoringConfig": "codex_ml.config",
    "TrainConfig": "codex_ml.config",
    "evaluate": "codex_ml.evaluator",
    "verify_run": "codex_ml.integrity",
    "Metric": "codex_ml.metrics",
    "build_model": "codex_ml.models",
    "generate": "codex_ml.models",
    "register": "codex_ml.registry",
    "TrainingResult": "codex_ml.result",
    "EvaluationConfig": "codex_ml.scorecard",
    "EvaluationResult": "codex_ml.scorecard",
    "set_seed": "codex_ml.seeding",
    "run_training": "codex_ml.train_loop",
    "set_cudnn_deterministic": "codex_ml.utils.determinism",
    "prune_checkpoints": "codex_ml.utils.retention",
}

if TYPE_CHECKING:  # the same names, for editors and type checkers
    from codex_ml.checkpoint import list_checkpoints, load_checkpoint, verify_checkpoint
    from codex_ml.config import CheckpointConfig, MonitoringConfig, ReproducibilityConfig, RetentionConfig, SchedulerConfig, TrainConfig
    from codex_ml.evaluator import evaluate
    from codex_ml.integrity import verify_run
    from codex_ml.metrics import Metric
    from codex_ml.models import build_model, generate
    from codex_ml.registry import register
    from codex_ml.result import TrainingResult
    from codex_ml.scorecard import EvaluationConfig, EvaluationResult
    from codex_ml.seeding import set_seed
    from codex_ml.train_loop import run_training
    from codex_ml.utils.determinism import set_cudnn_deterministic
    from codex_ml.utils.retention import prune_checkpoints

__all__ = [
    "CheckpointConfig",
    "EvaluationConfig",
    "EvaluationResult",
    "Metric",
    "MonitoringConfig",
    "ReproducibilityConfig",
    "RetentionConfig",
    "SchedulerConfig",
    "TrainConfig",
    "TrainingResult",
    "build_model",
    "evaluate",
    "generate",
    "list_checkpoints",
    "load_checkpoint",
    "prune_checkpoints",
    "register",
    "run_training",
    "set_cudnn_deterministic",
    "set_seed",
    "verify_checkpoint",
    "verify_run",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'codex_ml' has no attribute {name!r}. Its public names: {', '.join(__all__)}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
