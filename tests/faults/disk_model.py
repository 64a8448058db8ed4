"""What a disk may hold after a power cut.

`Recorder` writes down what a program does to the files under a folder. `Disk` replays that, one operation after the other, and gives for
each place every state that the disk may be in if the power fails there. It promises no more than POSIX does:

- What was written to a file is on the disk once that file was synced. Until then each sector of 512 bytes may have its old content or
  its new one, and the file any length between the old and the new; what was never written reads as zeros, or as rubbish.
- A name in a folder (a file made, a rename, a removal) is on the disk once that folder was synced. Until then any of these changes may
  be there and any other may not, whatever their order, but for those of one and the same name. Syncing a file does nothing for its name.
- A rename within a folder is there or not, nothing between. A rename into another folder may be there as the new name alone; the old
  name does not go without the new one appearing, unless the old one's folder is the one that was synced.
"""

import itertools
import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECTOR = 512
Tree = dict[str, bytes | None]  # path below the folder → content; None for a folder


def read_tree(base: Path) -> Tree:
    """All that is there now."""
    tree: Tree = {}
    for path in sorted(base.rglob("*")):
        tree[path.relative_to(base).as_posix()] = None if path.is_dir() else path.read_bytes()
    return tree


DEAD = 2**22 + 1  # no process has this number


def write_tree(base: Path, tree: Tree) -> None:
    """Put a state where nothing is. What the recorded process left is that of a dead one."""
    base.mkdir()
    for name, content in tree.items():
        name = name.replace(f"-{os.getpid()}-", f"-{DEAD}-")
        if content is None:
            os.mkdir(base / name)
        else:
            with open(base / name, "wb") as file:
                file.write(content)


def overlaid(old: bytes, at: int, data: bytes) -> bytes:
    return old[:at].ljust(at, b"\0") + data + old[at + len(data):]


class Recorder:
    """Used as the `around` of `shim.through`. `operations` holds tuples: what, then numbers of files and folders, names, content."""

    def __init__(self, base: Path):
        self.base, self.operations, self.lock = base, [], threading.RLock()
        self._content: dict[int, bytes] = {}  # as far as it is written down
        self.start: list[tuple[int, int, str, bytes | None]] = []  # number, folder, name, content
        self._numbers, self._next = {os.stat(base).st_ino: 0}, 1
        for path in sorted(base.rglob("*")):
            number = self._new(os.stat(path).st_ino)
            self.start.append((number, self._numbers[os.stat(path.parent).st_ino], path.name, None if path.is_dir() else path.read_bytes()))

    def _new(self, inode: int) -> int:
        self._numbers[inode] = self._next
        self._next += 1
        return self._numbers[inode]

    def ack(self, what: str) -> None:
        with self.lock:
            self.operations.append(("ack", what))

    def __call__(self, name: str, real: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        with self.lock:
            note = getattr(self, f"_{name}", None)
            return note(real, args, kwargs) if note else real(*args, **kwargs)

    def _place(self, path: Any, folder: int | None = None) -> tuple[int | None, str]:
        path = os.fspath(path)
        head, tail = os.path.split(path)
        found = os.stat(head or ".", dir_fd=folder) if head or folder is None else os.fstat(folder)
        return self._numbers.get(found.st_ino), tail

    def _number(self, fd: int) -> int | None:
        return self._numbers.get(os.fstat(fd).st_ino)

    def _open(self, real, args, kwargs):
        path, flags = args[0], args[1]
        before = os.path.lexists(path) if "dir_fd" not in kwargs else True
        fd = real(*args, **kwargs)
        if flags & os.O_CREAT and not before:
            folder, name = self._place(path)
            if folder is not None:
                number = self._new(os.fstat(fd).st_ino)
                self._content[number] = b""
                self.operations.append(("make", folder, name, number, b""))
        elif flags & os.O_TRUNC and stat.S_ISREG(os.fstat(fd).st_mode) and self._number(fd) is not None:
            self.operations.append(("cut", self._number(fd), 0))
        return fd

    def _mkdir(self, real, args, kwargs):
        real(*args, **kwargs)
        folder, name = self._place(args[0], kwargs.get("dir_fd"))
        if folder is not None:
            self.operations.append(("make", folder, name, self._new(os.stat(args[0]).st_ino), None))

    def _write(self, real, args, kwargs):
        done = real(*args, **kwargs)
        mode = os.fstat(args[0]).st_mode
        if stat.S_ISREG(mode) and (number := self._number(args[0])) is not None:
            self._note_write(number, os.lseek(args[0], 0, os.SEEK_CUR) - done, bytes(memoryview(args[1])[:done]))
        return done

    def _note_write(self, number: int, at: int, data: bytes) -> None:
        self.operations.append(("write", number, at, data))
        if number in self._content:
            self._content[number] = overlaid(self._content[number], at, data)

    def _pwrite(self, real, args, kwargs):
        done = real(*args, **kwargs)
        if (number := self._number(args[0])) is not None:
            self._note_write(number, args[2], bytes(memoryview(args[1])[:done]))
        return done

    def _ftruncate(self, real, args, kwargs):
        real(*args, **kwargs)
        if (number := self._number(args[0])) is not None:
            self.operations.append(("cut", number, args[1]))

    def _fsync(self, real, args, kwargs):
        real(*args, **kwargs)
        if (number := self._number(args[0])) is not None:
            if number in self._content:  # a file object of Python's writes past `os.write`
                with open(f"/proc/self/fd/{args[0]}", "rb") as file:
                    there = file.read()
                if there != self._content[number]:
                    self._note_write(number, 0, there)
            self.operations.append(("sync", number))

    def _rename(self, real, args, kwargs):
        source, target = self._place(args[0]), self._place(args[1])
        number = self._numbers.get(os.lstat(args[0]).st_ino)
        real(*args, **kwargs)
        if source[0] is None and target[0] is None:
            return
        if None in (source[0], target[0], number):
            raise NotImplementedError("a rename across the border of what is recorded")
        self.operations.append(("rename", *source, *target, number))

    _replace = _rename

    def _unlink(self, real, args, kwargs):
        folder, name = self._place(args[0], kwargs.get("dir_fd"))
        real(*args, **kwargs)
        if folder is not None:
            self.operations.append(("remove", folder, name))

    _remove = _rmdir = _unlink

    def _link(self, real, args, kwargs):
        raise NotImplementedError("links are not recorded")

    _symlink = _truncate = _link


@dataclass
class Change:
    """Of names: (folder, name, number or None). A rename into another folder has two parts, the new name first."""
    parts: list[tuple[int, str, int | None]]
    done: set[int] = field(default_factory=set)  # parts whose folder was synced

    def options(self) -> list[tuple[int, ...]]:
        """Which parts may be on the disk."""
        left = tuple(i for i in range(len(self.parts)) if i not in self.done)
        return [(), left[:1], left] if len(left) == 2 else [(), left]


class Disk:
    """The states of a recording. Iterate `replay`; after each operation `states` gives what a power cut there may leave."""

    def __init__(self, recorder: Recorder):
        self.folders: dict[int, dict[str, int]] = {0: {}}  # what is certain to be on the disk
        self.synced: dict[int, bytes] = {}
        self.content: dict[int, bytes] = {}  # what a reader sees now
        self.changes: list[Change] = []
        self.operations, self.acknowledged = recorder.operations, []
        for number, folder, name, content in recorder.start:
            self.folders[folder][name] = number
            if content is None:
                self.folders[number] = {}
            else:
                self.synced[number] = self.content[number] = content

    def replay(self) -> Iterator[tuple]:
        for operation in self.operations:
            getattr(self, f"_{operation[0]}")(*operation[1:])
            yield operation

    def _ack(self, what: str) -> None:
        self.acknowledged.append(what)

    def _make(self, folder: int, name: str, number: int, content: bytes | None) -> None:
        if content is None:
            self.folders[number] = {}
        else:
            self.synced[number] = self.content[number] = content
        self.changes.append(Change([(folder, name, number)]))

    def _write(self, number: int, at: int, data: bytes) -> None:
        self.content[number] = overlaid(self.content[number], at, data)

    def _cut(self, number: int, size: int) -> None:
        self.content[number] = self.content[number][:size].ljust(size, b"\0")

    def _sync(self, number: int) -> None:
        if number not in self.folders:
            self.synced[number] = self.content[number]
            return
        for change in self.changes:
            for i, (folder, name, what) in enumerate(change.parts):
                if folder == number and i not in change.done:
                    _set(self.folders[folder], name, what)
                    change.done.add(i)
        self.changes = [c for c in self.changes if len(c.done) < len(c.parts)]

    def _rename(self, source: int, old: str, target: int, new: str, number: int) -> None:
        parts = [(target, new, number), (source, old, None)]
        if source != target:
            self.changes.append(Change(parts))
        else:  # one change of one folder
            self.changes.append(_Both(parts))

    def _remove(self, folder: int, name: str) -> None:
        self.changes.append(Change([(folder, name, None)]))

    def tree(self, chosen: tuple[tuple[int, ...], ...] | None = None) -> dict[str, int]:
        """Path → number, with the chosen parts of the changes on the disk; all of them where nothing is chosen."""
        folders = {number: dict(names) for number, names in self.folders.items()}
        for change, parts in zip(self.changes, chosen or [c.options()[-1] for c in self.changes], strict=True):
            for i in parts:
                folder, name, number = change.parts[i]
                _set(folders[folder], name, number)
        found: dict[str, int] = {}
        self._walk(folders, 0, "", found)
        return found

    def _walk(self, folders: dict[int, dict[str, int]], number: int, path: str, found: dict[str, int]) -> None:
        for name, inner in folders[number].items():
            found[path + name] = inner
            if inner in folders:
                self._walk(folders, inner, f"{path}{name}/", found)

    def now(self) -> Tree:
        """What a reader sees without a power cut."""
        return {path: None if number in self.folders else self.content[number] for path, number in self.tree().items()}

    def states(self, limit: int, rng: random.Random) -> Iterator[Tree]:
        """What a power cut may leave here: all of it where that is no more than `limit` states, else a choice of it, its ends included."""
        options = [change.options() for change in self.changes]
        for chosen in _choices(options, limit, rng):
            if not self._in_order(chosen):
                continue
            tree = self.tree(tuple(chosen))
            unsure = [p for p, n in tree.items() if n not in self.folders and self.synced[n] != self.content[n]]
            variants = [self._variants(p, tree[p], limit, rng) for p in unsure]
            for contents in _choices(variants, limit, rng):
                state: Tree = {p: None if n in self.folders else self.content[n] for p, n in tree.items()}
                state.update(zip(unsure, contents, strict=True))
                yield state

    def _in_order(self, chosen: tuple[tuple[int, ...], ...]) -> bool:
        """Whether no change of a name is there without those of the same name before it."""
        missing: set[tuple[int, str]] = set()
        for change, parts in zip(self.changes, chosen, strict=True):
            names = {i: change.parts[i][:2] for i in range(len(change.parts)) if i not in change.done}
            if missing & {names[i] for i in parts if i in names}:
                return False
            missing |= {name for i, name in names.items() if i not in parts}
        return True

    def _variants(self, path: str, number: int, limit: int, rng: random.Random) -> list[bytes]:
        old, new = self.synced[number], self.content[number]
        if any(part.startswith((".tmp-", ".trash-", ".lock")) for part in path.split("/")):
            return [old, new]  # nobody reads it
        sectors = range(0, max(len(old), len(new)), SECTOR)
        blank = old.ljust(len(new), b"\0")
        changed = [s for s in sectors if blank[s:s + SECTOR] != new[s:s + SECTOR]]
        found = [old, new, *(new[:s] for s in sectors if s > len(old)), old + b"\xa5" * (len(new) - len(old))]
        for mask in _choices([(False, True)] * len(changed), max(8, limit), rng):
            mixed = bytearray(blank)
            for s, there in zip(changed, mask, strict=True):
                if there:
                    mixed[s:s + SECTOR] = new[s:s + SECTOR]
            found.append(bytes(mixed))
        return list(dict.fromkeys(found))


class _Both(Change):
    """A change that is on the disk as a whole or not at all."""

    def options(self) -> list[tuple[int, ...]]:
        return [(), (0, 1)]


def _set(names: dict[str, int], name: str, number: int | None) -> None:
    if number is None:
        names.pop(name, None)
    else:
        names[name] = number


def _choices(options: list, limit: int, rng: random.Random) -> Iterator[Any]:
    total = 1
    for option in options:
        total *= len(option)
    if total <= limit:
        yield from itertools.product(*options)
        return
    yield tuple(option[0] for option in options)
    yield tuple(option[-1] for option in options)
    for i in range(len(options)):  # one alone, and all but one
        yield tuple(o[-1] if j == i else o[0] for j, o in enumerate(options))
        yield tuple(o[0] if j == i else o[-1] for j, o in enumerate(options))
    for _ in range(max(0, limit - 2 - 2 * len(options))):
        yield tuple(rng.choice(option) for option in options)
