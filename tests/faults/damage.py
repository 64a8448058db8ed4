"""Ways to spoil a file."""

import random
from collections.abc import Iterable, Iterator


def flipped(content: bytes, at: int, bit: int) -> bytes:
    spoilt = bytearray(content)
    spoilt[at] ^= 1 << bit
    return bytes(spoilt)


def flips(content: bytes, full: bool, step: int) -> Iterator[tuple[str, bytes]]:
    """Each bit of each byte, or one bit of every `step`-th byte."""
    for at in range(0, len(content), 1 if full else step):
        for bit in range(8) if full else [(at // step) % 8]:
            yield f"bit {bit} of byte {at}", flipped(content, at, bit)


def cuts(content: bytes, full: bool, step: int) -> Iterator[tuple[str, bytes]]:
    """Each length from nothing to one byte less, or every `step`-th."""
    for size in range(0, len(content), 1 if full else step):
        yield f"cut to {size} bytes", content[:size]


def replaced(content: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """The whole file by something else."""
    half = len(content) // 2
    yield "zeros", bytes(len(content))
    yield "ones", b"\xff" * len(content)
    yield "noise", rng.randbytes(len(content))
    yield "zeros from the middle on", content[:half] + bytes(len(content) - half)
    yield "zeros up to the middle", bytes(half) + content[half:]
    yield "a byte more", content + b"\0"
    yield "a byte less at its start", content[1:]
    yield "twice", content * 2
    yield "nothing", b""


def chosen(ways: Iterable[tuple[str, bytes]], most: int, rng: random.Random) -> list[tuple[str, bytes]]:
    ways = list(ways)
    return ways if len(ways) <= most else rng.sample(ways, most)
