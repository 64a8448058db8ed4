"""Stands between the library and those functions of `os` that change a disk: to count them, to write them down, to make one fail."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OPERATIONS = ("open", "write", "pwrite", "fsync", "ftruncate", "close", "rename", "replace", "unlink", "remove", "mkdir", "rmdir", "dup",
              "link", "symlink", "truncate", "memfd_create")
CREATING = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link", "symlink")  # what a folder must be writable for


@contextmanager
def through(around: Callable[..., Any]) -> Iterator[None]:
    """While the block runs, each call of an operation, in any thread, becomes `around(name, real, args, kwargs)`."""
    real = {name: getattr(os, name) for name in OPERATIONS}

    def stand_in(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: around(name, real[name], args, kwargs)

    for name in OPERATIONS:
        setattr(os, name, stand_in(name))
    try:
        yield
    finally:
        for name in OPERATIONS:
            setattr(os, name, real[name])


class At:
    """Lets operations pass, and does `action` in the place of the k-th; `lasting`: of all that come after it and `concern` it too."""

    def __init__(self, k: int, action: Callable[..., Any], lasting: Callable[[str, tuple], bool] | None = None):
        self.k, self.action, self.lasting = k, action, lasting
        self.count, self.lock = 0, threading.Lock()
        self.what = ""

    def __call__(self, name: str, real: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        with self.lock:
            self.count += 1
            hit = self.count == self.k or (self.count > self.k and self.lasting is not None and self.lasting(name, args))
            if self.count == self.k:
                self.what = f"{name} {args[:1]}"
        return self.action(name, real, args, kwargs) if hit else real(*args, **kwargs)


def count(operations: Callable[[], Any]) -> int:
    """How many there are in a call."""
    counter = At(-1, lambda *_: None)
    with through(counter):
        operations()
    return counter.count


def leave(name: str, real: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    os._exit(9)


def leave_halfway(name: str, real: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """A write is done by half before the process ends; what cannot be halved is done whole."""
    if name in ("write", "pwrite"):
        real(args[0], memoryview(args[1])[: (len(args[1]) + 1) // 2], *args[2:])
    else:
        real(*args, **kwargs)
    os._exit(9)


def fails(code: int) -> Callable[..., Any]:
    """The operation raises the `OSError` of a code. A descriptor is closed even so, as Linux has it."""
    def action(name: str, real: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if name == "close":
            real(*args, **kwargs)
        raise OSError(code, os.strerror(code))

    return action


def no_memory(name: str, real: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    if name == "close":
        real(*args, **kwargs)
    raise MemoryError


def short(name: str, real: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """A write takes one byte of what it is given."""
    if name in ("write", "pwrite") and len(args[1]) > 1:
        return real(args[0], memoryview(args[1])[:1], *args[2:])
    return real(*args, **kwargs)


def concerned(code: int) -> Callable[[str, tuple], bool]:
    """Which operations fail while a disk is in the state that a code stands for."""
    def lasting(name: str, args: tuple) -> bool:
        creates = name == "open" and bool(args[1] & os.O_CREAT)
        if code in (errno.ENOSPC, errno.EDQUOT):
            return creates or name in ("write", "pwrite", "mkdir", "fsync")
        if code in (errno.EACCES, errno.EROFS, errno.EPERM):
            return creates or name in CREATING
        if code == errno.EMFILE:
            return name in ("open", "dup", "memfd_create")
        return name not in ("close", "memfd_create")

    return lasting
