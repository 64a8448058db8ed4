"""One flipped bit in each byte of the same tensors, in this format and in others: who notices?"""

import pytest
from formats import formats, made, tensors, tried


@pytest.mark.parametrize("how", formats(), ids=lambda f: f.name)
def test_one_flipped_bit(how, scratch, full, tally):
    folder = made(how, scratch / "saved")
    assert all(how.load(folder)[name].equal(tensor) for name, tensor in tensors().items())
    wanted = how.flips(folder, 1 if full else 97)
    counts = tried(how, folder, wanted)
    print(how.name, counts)
    assert sum(counts.values()) == len(wanted)
    if how.name == "codex_ml":
        assert counts["refused"] == len(wanted)
    elif full and "metadata" not in how.name:
        assert counts["silent"] > 0  # else the comparison is not what the table says
    tally("formats", how.name, **counts)
