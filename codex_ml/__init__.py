"""PyTorch training that stops anywhere, goes on from anywhere, and can be proved afterwards.

`import codex_ml` is cheap: a public name is imported from its module when it is first used, and torch with it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module that defines it
_PUBLIC = {
    "set_seed": "codex_ml.seeding",
    "set_cudnn_deterministic": "codex_ml.utils.determinism",
    "register": "codex_ml.registry",
}

if TYPE_CHECKING:  # the same names, for editors and type checkers
    from codex_ml.registry import register
    from codex_ml.seeding import set_seed
    from codex_ml.utils.determinism import set_cudnn_deterministic

__all__ = ["register", "set_cudnn_deterministic", "set_seed"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'codex_ml' has no attribute {name!r}. Its public names: {', '.join(__all__)}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
