import dataclasses
import json
import math
import re
import sys
from decimal import Decimal

import jsonschema
import numpy as np
import pytest
import referencing
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_ml.telemetry import schema
from codex_ml.telemetry.record import (
    decode,
    encode,
    event_record,
    manifest_name,
    scalar_record,
    snapshot_record,
    structured_records,
    utc_timestamp,
)
from codex_ml.telemetry.schema import KINDS, problems
from tools import schemas

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
    assert found["nan"] == "NaN" and found["np"] == 0.5 and found["t"] == 2 and found["bad"] == "a?b" and found["('a', 1)"] == [1]


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


# ---- the schemas

STAMP = "2026-11-24T08:30:00.123456Z"
BUILT = {
    "scalar": scalar_record("r", 3, "train", "loss", 0.5),
    "text": scalar_record("r", 3, "train", "grade", "good", dataset="d", tags={"phase": "eval"}),
    "nan": scalar_record("r", 3, "train", "loss", math.nan),
    "snapshot": snapshot_record("r", 3, {"system.cpu.utilization": 0.5, "gpu_count": 2, "odd": math.inf}),
    "event": event_record("r", 3, "checkpoint", "warning", {"path": "epoch-0001"}),
    "manifest": structured_records("r", 3, "train", "weights", "histogram", {"edges": [0.0, math.inf], "counts": [1]})[0],
    "sample": {"$schema": "codex_ml/sample.v1", "schema_version": "v1", "split": "test", "index": 0, "loss": math.inf, "prediction": [1, 2],
               "target": 2, "correct": True, "confidence": None},
    "row": structured_records("r", 3, "train", "weights", "histogram", {"edges": [0.0, math.inf], "counts": [1]}, tags={"layer": 1})[1],
}


def test_the_checked_in_schemas_are_those_of_the_dataclasses():
    assert schemas.differences(schemas.FOLDER) == []


def test_a_schema_that_is_not_in_step_is_seen_and_mended(tmp_path):
    schemas.write(tmp_path)
    assert schemas.differences(tmp_path) == []
    (tmp_path / "metrics.v1.json").write_text("{}")
    (tmp_path / "event.v1.json").unlink()
    (tmp_path / "old.json").touch()
    assert [line.split(": ")[1] for line in schemas.differences(tmp_path)] == [
        "missing", "not what its dataclass says", "no dataclass makes this file"]
    schemas.write(tmp_path)
    assert schemas.differences(tmp_path) == []


@pytest.mark.parametrize("name", BUILT)
def test_what_is_built_and_read_back_is_as_its_schema_says(name):
    record = BUILT[name]
    assert problems(record) == [] and problems(decode(encode(record))) == [] and problems(json.loads(encode(record))) == []
    declared = [field.name for field in dataclasses.fields(KINDS[record["$schema"]]) if field.default is dataclasses.MISSING]
    assert list(record)[: len(declared)] == ["$schema", *declared[1:]]


def test_any_validator_can_use_the_files():
    "With no knowledge of this library: the files alone, by their names."
    files = {path.name: json.loads(path.read_text()) for path in schemas.FOLDER.iterdir()}
    for content in files.values():
        jsonschema.Draft202012Validator.check_schema(content)
    registry = referencing.Registry().with_resources((name, referencing.Resource.from_contents(file)) for name, file in files.items())
    line = jsonschema.Draft202012Validator(files["line.json"], registry=registry)
    for record in BUILT.values():
        assert list(line.iter_errors(json.loads(encode(record)))) == []
    assert list(line.iter_errors({**BUILT["scalar"], "step": -1}))


@pytest.mark.parametrize("name,change,said", [
    ("scalar", {"step": -1}, "step: -1 is less than the minimum"),
    ("scalar", {"step": True}, "step: True is not of type 'integer'"),
    ("scalar", {"value": None}, "tags: 'manifest' is a required property"),
    ("scalar", {"value": [1]}, "value: [1] is not of type"),
    ("scalar", {"value": True}, "value: True is not of type"),
    ("scalar", {"extra": 1}, "Additional properties are not allowed ('extra' was unexpected)"),
    ("scalar", {"timestamp": "2026-11-24 08:30"}, "timestamp: '2026-11-24 08:30' is not a time in UTC"),
    ("scalar", {"schema_version": "v2"}, "schema_version: 'v1' was expected"),
    ("scalar", {"$schema": "codex_ml/metrics.v2"}, "$schema: 'codex_ml/metrics.v2' is no kind"),
    ("scalar", {"$schema": ["x"]}, "$schema: ['x'] is no kind"),
    ("scalar", {"dataset": 3}, "dataset: 3 is not of type 'string', 'null'"),
    ("snapshot", {"cpu": "high"}, "cpu: 'high' is not a number"),
    ("snapshot", {"cpu": None}, "cpu: None is not of type"),
    ("snapshot", {"cpu": True}, "cpu: True is not of type"),
    ("snapshot", {"split": "train"}, "split: 'system' was expected"),
    ("event", {"severity": "fatal"}, "severity: 'fatal' is not one of"),
    ("event", {"data": []}, "data: [] is not of type 'object'"),
    ("manifest", {"manifest": "x" * 16}, "manifest: 'xxxxxxxxxxxxxxxx' is not the first 16 digits"),
    ("sample", {"index": -1}, "index: -1 is less than"),
    ("sample", {"loss": "low"}, "loss: 'low' is not a number"),
    ("sample", {"places": 0}, "places: 0 is less than"),
    ("manifest", {"kind": 1}, "kind: 1 is not of type"),
])
def test_what_is_wrong_is_said_with_its_key(name, change, said):
    found = problems({**BUILT[name], **change})
    assert len(found) == 1 and found[0].startswith(said)


@pytest.mark.parametrize("name", BUILT)
def test_every_key_is_required(name):
    record = BUILT[name]
    needed = [f.name for f in dataclasses.fields(KINDS[record["$schema"]]) if f.default is dataclasses.MISSING]
    for key in ["$schema", *needed[1:]]:
        assert problems({k: v for k, v in record.items() if k != key}) != []


def test_without_the_package_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    schema._validators.cache_clear()
    with pytest.raises(schema.SchemaError, match=r'pip install "codex_ml\[schema\]"'):
        problems(BUILT["scalar"])
    schema._validators.cache_clear()


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(), st.floats()))
def test_a_snapshot_reads_back_exactly(values):
    record = {**values, **snapshot_record("r", 1, {})}
    back = decode(encode(record))
    for key, value in record.items():
        key = key.encode("utf-8", "replace").decode()
        assert back[key] == value or (math.isnan(value) and math.isnan(back[key]))


def test_a_manifest_has_the_name_of_its_content():
    data = {"edges": [0.5, math.nan], "counts": {2: [1]}, "who": object}
    first, row = structured_records("a", 1, "train", "w", "histogram", data, timestamp=STAMP)
    second, _ = structured_records("b", 9, "test", "v", "histogram", dict(reversed(data.items())))
    assert first["manifest"] == second["manifest"] == row["tags"]["manifest"]
    back = decode(encode(first))
    assert manifest_name(back["kind"], back["data"]) == first["manifest"]
    assert structured_records("a", 1, "train", "w", "other", data)[0]["manifest"] != first["manifest"]
