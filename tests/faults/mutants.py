"""The library with one step taken out or two exchanged, for as long as a block runs.

Each place where it waits for the disk is found in its source, so that a new one is a new mutant. The code of the function is replaced,
not the function: whoever has imported it runs the mutant too.
"""

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import codex_ml

PACKAGE = Path(codex_ml.__file__).parent
Edit = Callable[[ast.AST], bool]  # changes a function's tree in place; whether it found what it changes


@dataclass
class Mutant:
    name: str
    module: str
    function: str  # qualified
    edit: Edit

    @contextmanager
    def alive(self) -> Iterator[None]:
        module = importlib.import_module(self.module)
        function = _function(module, self.function)
        tree = ast.parse(inspect.getsource(module))
        target = _definition(tree, self.function)
        if not self.edit(target):
            raise LookupError(f"{self.name}: {self.function} in {self.module} has nothing of that kind any more")
        code = _code(compile(ast.fix_missing_locations(tree), module.__file__ or "", "exec"), self.function)
        before = function.__code__
        function.__code__ = code
        try:
            yield
        finally:
            function.__code__ = before


def _function(module: ModuleType, name: str) -> FunctionType:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return inspect.unwrap(found)


def _definition(tree: ast.AST, name: str) -> ast.AST:
    for part in name.split("."):
        tree = next(n for n in ast.iter_child_nodes(tree) if getattr(n, "name", None) == part)
    return tree


def _code(code: CodeType, name: str) -> CodeType:
    for part in name.split("."):
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == part)
    return code


def _is_sync(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in ("os.fsync", "fsync_dir")


def _bodies(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
                yield body


def without_sync(index: int) -> Edit:
    """Take out the sync of that number in a function."""
    def edit(tree: ast.AST) -> bool:
        found = [(body, i) for body in _bodies(tree) for i, node in enumerate(body) if _is_sync(node)]
        if index >= len(found):
            return False
        body, i = found[index]
        body[i] = ast.Pass()
        return True

    return edit


def moved(what: str, before: str) -> Edit:
    """Put the statement that contains `what` before the one that contains `before`, in the same body."""
    def edit(tree: ast.AST) -> bool:
        for body in _bodies(tree):
            texts = [ast.unparse(node) for node in body]
            first = [i for i, text in enumerate(texts) if before in text]
            second = [i for i, text in enumerate(texts) if what in text]
            if first and second and first[0] < second[-1]:
                body.insert(first[0], body.pop(second[-1]))
                return True
        return False

    return edit


def rewritten(old: str, new: str) -> Edit:
    """Replace the first statement that begins with `old` by the source `new`."""
    def edit(tree: ast.AST) -> bool:
        for body in _bodies(tree):
            for i, node in enumerate(body):
                if ast.unparse(node).startswith(old):
                    body[i:i + 1] = ast.parse(new).body
                    return True
        return False

    return edit


def both(*edits: Edit) -> Edit:
    return lambda tree: min([edit(tree) for edit in edits])  # each of them is made


def syncs() -> list[Mutant]:
    """One mutant for each place in the library that waits for the disk."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        module = ".".join(["codex_ml", *path.relative_to(PACKAGE).with_suffix("").parts])
        for owner in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]:
            for function in (n for n in owner.body if isinstance(n, ast.FunctionDef)):
                name = f"{owner.name}.{function.name}" if isinstance(owner, ast.ClassDef) else function.name
                count = sum(_is_sync(node) for body in _bodies(function) for node in body)
                found += [Mutant(f"{path.stem}.{name} without sync {i + 1} of {count}", module, name, without_sync(i))
                          for i in range(count)]
    return found


ORDERS = [
    Mutant("a file's name before its content is synced", "codex_ml.durable", "write_atomic",
           rewritten("written = write_file", "fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL); out = HashingFile(fd)\n"
                     "content(out) if callable(content) else out.write(content.encode() if isinstance(content, str) else content)\n"
                     "os.close(fd); written = Written(tmp, out.hash.hexdigest(), out.bytes)")),
    Mutant("a folder's name before its entries are synced", "codex_ml.durable", "publish_folder",
           both(rewritten("retried(os.rename", "fsync_dir(final)"), rewritten("fsync_dir(tmp)", "retried(os.rename, tmp, final)"))),
    Mutant("a folder's parent synced before the rename", "codex_ml.durable", "publish_folder",
           moved("fsync_dir(final.parent)", "os.rename")),
    Mutant("a file's folder synced before the rename", "codex_ml.durable", "write_atomic",
           moved("fsync_dir(path.parent)", "os.replace")),
    Mutant("files deleted before the folder has lost its name durably", "codex_ml.durable", "remove_folder",
           moved("shutil.rmtree", "fsync_dir")),
    Mutant("the pointer before the checkpoint", "codex_ml.run_folder", "RunFolder.save",
           rewritten("checkpoint = save_checkpoint", "write_pointer(self.path, {'epoch': facts['epoch'], 'path': name, "
                     "'checkpoint_sha256': 64 * '0', 'schema_version': 'v1'})\n"
                     "checkpoint = save_checkpoint(self.path, name, state, facts, dict(manifest))")),
    Mutant("older checkpoints dropped before the new one is there", "codex_ml.run_folder", "RunFolder.save",
           rewritten("checkpoint = save_checkpoint", "if self.latest: [__import__('codex_ml.durable').durable.remove_folder(c.folder) "
                     "for c in list_checkpoints(self.path) if not c.is_epoch]\n"
                     "checkpoint = save_checkpoint(self.path, name, state, facts, dict(manifest))")),
    Mutant("a segment deleted before its compressed form is there", "codex_ml.telemetry.segments", "_compress",
           rewritten("if not packed.exists()", "if path.exists():\n    with path.open('rb') as source:\n        path.unlink()\n"
                     "        write_atomic(packed, lambda out: _gzip(source, out))")),
    Mutant("metrics flushed without the folders of a new file", "codex_ml.telemetry.appender", "Appender.unsynced",
           rewritten("try:", "if self.regular and self._fd >= 0 and self._unsynced:\n    found.append(os.dup(self._fd))")),
    Mutant("metrics flushed without the files that were cut off", "codex_ml.telemetry.appender", "Appender.unsynced",
           rewritten("found, self._left =", "found = []")),
]

CHECKS = [  # what is looked at before a checkpoint is used
    Mutant("a checkpoint is used whatever its hash", "codex_ml.durable", "verified_copy", rewritten("if found != sha256", "pass")),
    Mutant("a checkpoint is used whatever its place", "codex_ml.checkpoint", "load_checkpoint",
           rewritten("if not isinstance(state, dict)", "pass")),
    Mutant("metadata are used whosever they are", "codex_ml.checkpoint", "_checked_metadata", rewritten("if metadata[own] !=", "pass")),
]
