import json
import math
import re
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_ml.telemetry.record import decode, encode, scalar_record, utc_timestamp

COLUMNS = ["$schema", "schema_version", "timestamp", "run_id", "step", "split", "metric", "value", "dataset", "tags"]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[]))
anything = st.recursive(scalars, lambda x: st.lists(x) | st.dictionaries(scalars, x), max_leaves=8)


def strict(line):
    "Parse as a reader would that knows the standard and nothing of Python."
    def refuse(text):
        raise AssertionError(text)
    value = json.loads(line, parse_constant=refuse)
    json.dumps(value, ensure_ascii=False).encode("utf-8")  # raises on half a surrogate pair
    return value


@settings(max_examples=300, deadline=None)
@given(value=st.floats(), step=st.integers(0, 2**70), metric=st.text(st.characters(exclude_categories=[])),
       tags=st.dictionaries(scalars, anything, max_size=3))
def test_every_record_is_one_line_of_standard_json(value, step, metric, tags):
    record = scalar_record("r", step, "train", metric, value, tags=tags)
    line = encode(record)
    assert line.endswith(b"\n") and line.decode("ascii").splitlines() == [line[:-1].decode()]
    assert list(strict(line)) == COLUMNS
    back = decode(line)
    assert back["step"] == step and (back["value"] == value or (math.isnan(value) and math.isnan(back["value"])))


@pytest.mark.parametrize("value", [
    1, 1.0, True, np.float32(1), np.int64(1), np.array(1.0), np.array([1.0])[0], torch.tensor(1.0), torch.tensor(1.0, requires_grad=True),
    torch.tensor(1, dtype=torch.int8), Decimal(1), torch.tensor(1.0, dtype=torch.bfloat16),
])
def test_whatever_is_a_number_becomes_a_float(value):
    record = scalar_record("r", np.int64(3), "train", "loss", value)
    assert record["value"] == 1.0 and type(record["value"]) is float and type(record["step"]) is int
    assert b'"value":1.0,' in encode(record)


@pytest.mark.parametrize("value", [
    b"1", bytearray(b"1"), np.bytes_(b"1"), None, [1.0], {}, torch.ones(2), np.ones(2), 10**400, 1j, object(),
])
def test_what_is_no_number_names_its_metric(value):
    with pytest.raises(TypeError, match="metric 'val_acc'"):
        scalar_record("r", 1, "train", "val_acc", value)


@pytest.mark.parametrize("value", ["good", "", "1.0", np.str_("good"), np.array("good"), "größe\n😀"])
def test_a_text_stays_a_text(value):
    record = scalar_record("r", 1, "v", "grade", value)
    assert type(record["value"]) is str and decode(encode(record))["value"] == str(value)


@pytest.mark.parametrize("step", [1.5, "1", None])
def test_a_step_is_a_whole_number(step):
    with pytest.raises(TypeError):
        scalar_record("r", step, "train", "loss", 1.0)


def test_tags_that_json_has_no_form_for():
    tags = {"nan": math.nan, "np": np.float32(0.5), "t": torch.tensor(2), "bad": "a\ud800b", ("a", 1): {1, }, "path": b"\xff"}
    found = strict(encode(scalar_record("r", 1, "s", "m", 1.0, tags=tags)))["tags"]
    assert found["nan"] == "NaN" and found["np"] == 0.5 and found["t"] == 2 and found["bad"] == "a?b" and found["('a', 1)"] == "{1}"


@pytest.mark.parametrize("where", ["metric", "split", "run_id", "dataset", "tags"])
def test_half_a_surrogate_pair_goes_nowhere(where):
    words = {"run_id": "r", "split": "s", "metric": "m"} | {where: {"a": "x\ud800"} if where == "tags" else "x\ud800"}
    found = strict(encode(scalar_record(step=1, value=1.0, **words)))
    assert found[where] in ("x?", {"a": "x?"})


def test_an_emoji_and_line_separators_survive():
    name = "loss\u2028\u0085\n😀"
    assert decode(encode(scalar_record("r", 1, "s", name, 1.0)))["metric"] == name


@pytest.mark.parametrize("line", [
    b"", b"{", b"[]", b"1", b"null", b'{"value": NaN, "schema_version": "v1"}', b"\xff", b"\x00" * 40, b'{"schema_version": "v2"}',
    b'{"a":' * 100_000, b"\xef\xbb\xbf{}",
])
def test_what_is_no_record_is_a_value_error(line):
    with pytest.raises(ValueError):
        decode(line)


def test_the_timestamp():
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", utc_timestamp())
