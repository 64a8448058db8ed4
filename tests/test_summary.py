"""The summary beside plain Python, over files that nobody should write."""

import csv
import gzip
import io
import json
import math
import os
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("polars")

from codex_ml.telemetry import tally
from codex_ml.telemetry.record import SCHEMA, SNAPSHOT, decode, encode, event_record, scalar_record, snapshot_record, structured_records
from codex_ml.telemetry.shapes import cut_lines, judge
from codex_ml.telemetry.summary import COLUMNS, summarize, summarize_to, table

TIME = "2026-11-24T08:30:00.000000Z"
HEAD = '{"$schema":"codex_ml/metrics.v1","schema_version":"v1","timestamp":"' + TIME + '",'


def line(step=1, value="0.5", run_id='"r"', split='"train"', metric='"loss"', rest=',"dataset":null,"tags":{}}'):
    """A line with texts of JSON in its places."""
    return f'{HEAD}"run_id":{run_id},"step":{step},"split":{split},"metric":{metric},"value":{value}{rest}'.encode()


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(piece if piece.endswith(b"\n") else piece + b"\n" for piece in lines))
    return path


def one(*args, **kwargs):
    [row] = summarize(*args, **kwargs)
    return row


# ---- the same in plain Python

def plain(data):
    """The rows for one file of these bytes, and how many records there are, from its lines alone."""
    points, records = {}, 0
    for number, text in enumerate(data.split(b"\n")):
        try:
            record = decode(text)
        except ValueError:
            continue
        found = list(plain_points(record, number))
        if None in found:
            continue
        records += 1
        for key, at, *point in found:
            points.setdefault(key, {}).pop(at, None)
            points[key][at] = point
    return sorted((plain_row(key, found) for key, found in points.items()),
                  key=lambda row: [row[name] or "" for name in ("run_id", "split", "metric", "dataset")]), records


def plain_points(record, number):
    def clean(text):
        return text.encode("utf-8", "replace").decode() if isinstance(text, str) else None

    schema, step, time = record.get("$schema"), record.get("step"), record.get("timestamp")
    if schema not in (SCHEMA, SNAPSHOT):
        return
    head, metric = (clean(record.get("run_id")), clean(record.get("split"))), clean(record.get("metric"))
    texts = [*head] if schema == SNAPSHOT else [*head, metric]
    if None in texts or type(step) is not int or step not in range(-2**63, 2**63) or not isinstance(time, str | None):
        yield None
    elif schema == SNAPSHOT:
        for name, value in record.items():
            if name not in ("$schema", "schema_version", "timestamp", "run_id", "step", "split") and type(value) in (int, float):
                yield (*head, clean(name), None), number, step, plain_number(value), clean(time), head[1]
    elif record.get("dataset") is not None and not isinstance(record["dataset"], str):
        yield None
    else:
        tags = record.get("tags")
        phase = clean(tags.get("phase")) if isinstance(tags, dict) else None
        key, value = (*head, metric, clean(record.get("dataset"))), plain_number(record.get("value"))
        yield key, step, step, value, clean(time), head[1] if phase is None else phase


def plain_number(value):
    if isinstance(value, bool | int | float):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return None


def plain_row(key, found):
    numbers = [p[1] for p in found.values() if p[1] is not None]
    finite = [v for v in numbers if math.isfinite(v)]
    first, last = found[min(found)], found[max(found)]
    try:
        average = math.fsum(finite) / len(finite) if finite else None
    except OverflowError:
        average = float(sum(map(Fraction, finite)) / len(finite))
    return {**dict(zip(("run_id", "split", "metric", "dataset"), key, strict=True)),
            "count": len(found), "non_finite": len(numbers) - len(finite), "non_numeric": len(found) - len(numbers),
            "first_step": first[0], "last_step": last[0], "first_time": first[2], "last_time": last[2], "first": first[1], "last": last[1],
            "min": min(finite, default=None), "max": max(finite, default=None), "mean": average,
            "first_phase": first[3], "last_phase": last[3]}


def exact(rows):
    """Rows as texts, in which NaN is NaN and 0.0 is not -0.0. A zero that is a bound or a mean has no sign of its own."""
    def text(name, value):
        return repr(value + 0.0 if name in ("min", "max", "mean") and value == 0 else value)
    return [{name: text(name, row[name]) for name in COLUMNS} for row in rows]


# ---- random files

# JSON texts, right and wrong, that are alike to a hasty reader
NUMBERS = ["0.5", "2", "-3", "0", "-0", "-0.0", "1e5", "1E-7", "1e999", "-1e999", "1e-999", "5e-324", "1.7976931348623157e308", "0.1",
           "9007199254740993", "12345678901234567890123", "1" + "0" * 310, "-1" + "0" * 400, "3." + "0" * 60 + "1"]
VALUES = [*NUMBERS, '"NaN"', '"Infinity"', '"-Infinity"', "null", '"good"', '"a,b"', '"nan"', '"1.5"', "true", "false", "[1,2]",
          '{"value":3,"x":1}', '"\\u004eaN"', "NaN", "Infinity", "-Infinity", "nan", "+1", ".5", "5.", "01", "1_0", "0x1", "1.5.2", "1e",
          "-", "", " 7", "7 ", '"NaN', "NaN\"", "1\x002"]
STEPS = ["1", "2", "3", "10", "20", "0", "-1", "-0", "1.0", "1e1", "01", '"5"', "null", "true", "9223372036854775807",
         "9223372036854775808", "-9223372036854775808", "999999999999999999", "1000000000000000000", " 4", "4 ", ""]
NAMES = ['"loss"', '"lr"', '"l\\u006fss"', '"ä"', '"\\ud800"', '"\\u20ac"', '"a\\"b"', '"x,\\"step\\":7,"', '"\\n"', '"\\u0000"', '""',
         "null", "3", '"tab\tin it"', '"line\\\\"']
RESTS = [',"dataset":null,"tags":{}}', ',"dataset":"wiki","tags":{"phase":"eval"}}',
         ',"dataset":"w,i","tags":{"phase":"ev,al","n":[1,{"value":2}]}}', ',"dataset":null,"tags":{"step":5,"value":7}}', ',"value":9}',
         ',"step":77,"tags":{}}', ',"metric":"other"}', ',"tags":{"phase":3},"timestamp":"later"}', ',"timestamp":null}', ',"timestamp":5}',
         ',"dataset":5}', ',"tags":null}', ',"tags":[{"phase":"x"}]}', "}", "", ',"tags":{}', ',"tags":{}}x', ',"tags":{}} \r',
         ',"tags":{"phase":"\\ud834\\udd1e"}}', ',"schema_version":"v2"}', ',"$schema":"codex_ml/system.v1","gpu":1.5}',
         ',"$schema":"other"}', ',"run_id":"s"}', ',"tags":{"phase":"süd"}}', ',"tags":{"a":NaN}}',
         ',"tags":' + "[" * 3000 + "]" * 3000 + "}"]


def changed(old, new):
    """The usual line with a text in it replaced."""
    assert old in line()
    return line().replace(old, new)


WHOLE = [b"", b" ", b"\r", b"{", b"}", b"null", b"[]", b"{}", b"\x00" * 30, b"\xff\xfe", b"\xef\xbb\xbf" + line(), line()[:80],
         line()[:-1], b'{"schema_version":"v1"}', b" " + line(), line() + b"\r", line() + b" ", line() + line(),
         line().replace(b'":', b'": ').replace(b',"', b', "'), changed(b'"train"', b'"tra\xffin"'), changed(b'"train"', '"träin"'.encode()),
         changed(b'"train"', b'"tra\x01in"'), changed(TIME.encode(), b"yesterday"), changed(b"00000Z", b"00000\\u005a"),
         changed(b"2026-", b'20"6-'), changed(b"08:30", b"08,30"), changed(b"08:30", b"08\n30")[:90], changed(b'"$schema"', b'"schema"'),
         changed(b"metrics.v1", b"metrics.v2"), encode(event_record("r", 2, "x", data={"step": 3, "value": 5, "metric": "loss"})),
         *map(encode, structured_records("r", 2, "train", "h", "histogram", {"edges": [0, 1], "counts": [3]})),
         encode(snapshot_record("r", 2, {"cpu": 0.5, "gpu": float("nan"), "on": True, "name": "x", "n": 3}, TIME)),  # type: ignore[dict-item]
         encode(snapshot_record("r", 1, {"cpu": 0.25, "value": 2.0, "ä": 10**400, "metric": 5}))]
mostly = st.sampled_from
lines = st.one_of(
    st.builds(lambda step, value: line(step, repr(value)), st.integers(0, 12), st.floats(allow_nan=False, allow_infinity=False)),
    st.builds(line, mostly(STEPS), mostly(VALUES), mostly(['"r"', '"s"']), mostly(['"train"', '"v"']), mostly(NAMES), mostly(RESTS)),
    st.builds(lambda step, rest: line(step, rest=rest), st.integers(0, 5), mostly(RESTS[:8])),
    st.builds(lambda step, value: line(step, value), st.integers(0, 5), mostly(VALUES)),
    mostly(WHOLE), st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace").replace(b"\n", b"")),
    st.builds(lambda at, byte: line()[:at] + bytes([byte]) + line()[at + 1:], st.integers(0, len(line())), st.integers(0, 255)))


EXAMPLES = int(os.environ.get("SUMMARY_EXAMPLES", "150"))
HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=HEALTH)
@given(st.lists(st.tuples(lines, st.integers(1, 5)), max_size=25), st.sampled_from([300, 1000, 10**6]), st.booleans(), st.booleans())
def test_it_agrees_with_plain_python(tmp_path_factory, monkeypatch, found, size, ends, crowd):
    """`crowd`: many lines of usual shapes among them, so that the shapes of the others are judged too. `size`: of a chunk."""
    data = b"\n".join(text.rstrip(b"\n") for text, times in found for _ in range(times if crowd else 1)) + b"\n" * ends
    path = tmp_path_factory.mktemp("s") / "metrics.ndjson"
    path.write_bytes(data)
    real = tally.chunks
    with monkeypatch.context() as patch:
        patch.setattr(tally, "chunks", lambda file, broken: real(file, broken, size))
        told = []
        rows = summarize([path], told.append)
    expected, records = plain(data)
    assert exact(rows) == exact(expected)
    assert f"{records:,} records in 1 file" in told[0]


def test_the_usual_lines_are_all_cut_by_their_shape():
    """Otherwise the test above would only compare the slow way with itself."""
    values = [*(number for number in NUMBERS[:15] if number != "-0"), '"NaN"', '"Infinity"', '"-Infinity"']
    texts = [line(step, value) for step in (1, 20, 999999999999999999) for value in values]
    lines, shapes = cut_lines(b"\n".join([*texts, line(3, rest=RESTS[1]), line(4)]))
    assert len(lines) == len(texts) + 1 and shapes["shape"].null_count() == 0 and shapes.height == 2 and all(map(judge, shapes["shape"]))
    [usual] = [shape for shape in shapes.to_dicts() if len(shape["row"]) > 1]
    assert usual["row"] == [*range(len(texts))] and usual["step"] == [decode(text)["step"] for text in texts]
    assert [*map(repr, usual["value"])] == [repr(float(decode(text)["value"])) for text in texts]


def test_lines_of_one_hash_and_two_shapes_are_kept_apart(tmp_path, monkeypatch):
    import polars as pl
    monkeypatch.setattr(pl.Expr, "hash", lambda self, *seeds: self.bin.size() * 0)
    lines = [line(step, metric='"loss"' if step % 2 else '"lr"') for step in range(20)]
    assert [row["count"] for row in summarize([write(tmp_path / "m.ndjson", *lines)])] == [10, 10]


@pytest.mark.parametrize("rest", [',"value":9}', ',"value":1.5}', ',"step":1}', ',"step":2}', f',"timestamp":"{TIME}"' + "}",
                                  ',"schema_version":"v2"}', ",]", ',"$schema":"x"}', ',"tags":nan}'])
def test_a_shape_whose_holes_are_not_the_record_is_refused(rest):
    assert judge(cut_lines(line(rest=RESTS[0]) + b"\n")[1]["shape"][0])
    assert judge(cut_lines(line(rest=',"dataset":null' + rest) + b"\n")[1]["shape"][0]) is None


# ---- what counts

def test_of_a_step_that_was_reported_twice_the_last_record_counts(tmp_path):
    first = [line(step, 100 + step) for step in range(1, 14)]
    again = [line(step, step) for step in range(10, 21)]
    row = one([write(tmp_path / "m.ndjson", *first, *again)])
    assert (row["count"], row["first"], row["last"], row["min"], row["max"], row["last_step"]) == (20, 101, 20, 10, 109, 20)
    assert row["mean"] == (sum(range(101, 110)) + sum(range(10, 21))) / 20


def test_what_only_looks_like_the_usual_line_is_read_as_what_it_is(tmp_path):
    """Each of them many times, in one file with lines of their shape."""
    usual = [line(1)] * 4
    assert repr(one([write(tmp_path / "a.ndjson", *usual, *[line(2, "-0")] * 4)])["last"]) == "0.0"
    assert repr(one([write(tmp_path / "b.ndjson", *usual, *[line(2, "-0.0")] * 4)])["last"]) == "-0.0"
    assert one([write(tmp_path / "c.ndjson", b"\xef\xbb\xbf" + line(0), *usual)])["count"] == 1
    for time in (b'2026-11-24T08:30:00.00000"Z', b"2026-11-24T08:30:00.0000\\tZ", b"2026-11-24T08:30:00.00000\tZ"):
        assert len(time) == len(TIME)
        row = one([write(tmp_path / "d.ndjson", *usual, *[line(2).replace(TIME.encode(), time)] * 4)])
        assert (row["last_step"], row["last_time"]) == ((2, "2026-11-24T08:30:00.0000\tZ") if b"\\t" in time else (1, TIME))


def test_usual_and_other_lines_of_a_step_keep_their_order(tmp_path):
    for values, last in (([1, 1, 1, " 7", 2, 2], 2), ([1, 1, 1, 2, 2, " 7"], 7)):
        assert one([write(tmp_path / "m.ndjson", *(line(1, value) for value in values))])["last"] == last
    told = []
    assert one([write(tmp_path / "m.ndjson", *[line(1)] * 4, *[line("02")] * 4)], told.append)["last_step"] == 1 and len(told) == 5


@pytest.mark.parametrize("text", [line().replace(b'"run_id":"r","step":1,', b"")[:-1] + b',"run_id":"r","step":1,"x":2}',
                                  line("1e1"), line("02"), line(value="+1"), line().replace(TIME.encode(), b"")])
def test_a_line_without_such_holes_has_no_shape(text):
    assert cut_lines(text + b"\n")[1]["shape"].to_list() == [None]


def test_snapshots_in_two_chunks_are_told_apart(tmp_path, monkeypatch):
    real = tally.chunks
    monkeypatch.setattr(tally, "chunks", lambda file, broken: real(file, broken, 100))
    data = [encode(snapshot_record("r", 5, {"cpu": value})) for value in (1.0, 2.0, 3.0)]
    row = one([write(tmp_path / "m.ndjson", *data)])
    assert (row["count"], row["first"], row["last"]) == (3, 1, 3)


def test_first_and_last_are_found_in_chunks_of_one_line(tmp_path, monkeypatch):
    real = tally.chunks
    monkeypatch.setattr(tally, "chunks", lambda file, broken: real(file, broken, 250))
    for steps in ([0, 1], [1, 0], [0, 0, 1, 1], [1, 1, 0, 0], [3, 1, 2, 3, 1]):
        row = one([write(tmp_path / "m.ndjson", *(line(step, value) for value, step in enumerate(steps)))])
        last = {step: value for value, step in enumerate(steps)}
        assert (row["first"], row["last"], row["first_step"], row["last_step"]) == (last[min(last)], last[max(last)], min(last), max(last))


def test_steps_of_one_series_in_lines_of_two_shapes_keep_their_order(tmp_path):
    lines = [line(step % 4, step, rest=RESTS[0] if step % 3 else ',"dataset":null,"tags":{"phase":"x"}}') for step in range(40)]
    row = one([write(tmp_path / "m.ndjson", *lines)])
    assert (row["count"], row["first"], row["last"], row["mean"], row["first_phase"], row["last_phase"]) == (4, 36, 39, 37.5, "x", "x")


def test_every_snapshot_counts_in_the_order_of_the_file(tmp_path):
    data = [encode(snapshot_record("r", step, {"cpu": value}, f"t{value}")) for step, value in ((5, 1), (5, 3), (4, 2))]
    row = one([write(tmp_path / "m.ndjson", *data)])
    assert (row["count"], row["mean"], row["first"], row["last"]) == (3, 2, 1, 2)
    assert (row["first_step"], row["last_step"], row["last_time"]) == (5, 4, "t2")
    assert (row["split"], row["metric"], row["dataset"]) == ("system", "cpu", None)


def test_texts_and_structures_count_and_have_no_mean(tmp_path):
    row = one([write(tmp_path / "m.ndjson", line(1, '"good"'), line(2, "null"), line(3, '"NaN"'))])
    assert (row["count"], row["non_numeric"], row["non_finite"], row["first"], row["mean"], row["min"]) == (3, 2, 1, None, None, None)
    assert math.isnan(row["last"])


def test_the_mean_is_of_the_exact_sum(tmp_path):
    values = [1e16, 1.0, -1e16] * 4000
    assert one([write(tmp_path / "m.ndjson", *(line(i, v) for i, v in enumerate(values)))])["mean"] == 4000 / 12000
    assert one([write(tmp_path / "m.ndjson", line(1, 1.7e308), line(2, 1.7e308))])["mean"] == 1.7e308


# ---- streams

def test_a_folder_is_all_streams_with_their_segments_each_once(tmp_path):
    stream = write(tmp_path / "run" / ".codex" / "metrics.ndjson", line(4, 4))
    (stream.parent / "metrics.ndjson.00001.gz").write_bytes(gzip.compress(line(1, 1) + b"\n"))
    write(stream.parent / "metrics.ndjson.00002", line(2, 2))
    (stream.parent / "metrics.ndjson.00003").write_bytes(line(3, 3) + b"\n")
    (stream.parent / "metrics.ndjson.00003.gz").write_bytes(gzip.compress(line(3, 3) + b"\n"))
    write(tmp_path / "run" / "eval" / "metrics.ndjson", line(4, 8, split='"validation"', rest=RESTS[1]))
    write(tmp_path / "run" / "eval" / "records.ndjson", b'{"index": 0, "loss": 2.5}')
    told = []
    train, validation = summarize([tmp_path, tmp_path / "run", stream, stream.parent / "metrics.ndjson.00002"], told.append)
    assert (train["count"], train["mean"], train["first"], train["last"]) == (4, 2.5, 1, 4)
    assert (validation["dataset"], validation["last_phase"], validation["last"]) == ("wiki", "eval", 8)
    assert told[-1] == "5 records in 5 files" and any("records.ndjson" in text and "passed over" in text for text in told[:-1])


def test_what_is_bad_is_told_with_its_place_and_takes_nothing_with_it(tmp_path):
    lines = [*map(line, range(5)), b"here the loss was fine", line(5), line("true"), line(6)[:100], line(7), line(8)]
    path = write(tmp_path / "m.ndjson", *lines)
    told = []
    assert one([path], told.append)["count"] == 8
    assert told[0] == "8 records in 1 file, 1 more cut short by a kill or a full disk"
    assert told[1].startswith(f"skipped {path}:6: ") and told[2].startswith(f"skipped {path}:8: its step is True") and len(told) == 3


def test_places_are_right_in_later_chunks_and_many_bad_lines_are_counted(tmp_path, monkeypatch):
    real = tally.chunks
    monkeypatch.setattr(tally, "chunks", lambda file, broken: real(file, broken, 1000))
    path, told = write(tmp_path / "m.ndjson", *[line(i) for i in range(200)], *[b"bad"] * 50), []
    assert one([path], told.append)["count"] == 200
    assert [text.split(": ")[0].rpartition(":")[2] for text in told[1:21]] == [str(number) for number in range(201, 221)]
    assert told[21].startswith("skipped 30 more")


@pytest.mark.parametrize("cut", [1, 8, 12, 5000, 50_000])
def test_a_segment_that_ends_early_gives_what_it_holds(tmp_path, cut):
    stream = write(tmp_path / "m.ndjson", line(10**6))
    packed = gzip.compress(b"".join(line(i, i * 0.37) + b"\n" for i in range(20_000)))
    (tmp_path / "m.ndjson.00001.gz").write_bytes(packed[:-cut])
    told = []
    row = one([stream], told.append)
    assert row["last_step"] == 10**6 and row["count"] > 20_000 * (len(packed) - cut) / len(packed) * 0.9 - 500
    assert any(".00001.gz:" in text for text in told[1:])


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_chunks_are_the_file_in_whole_lines(tmp_path, size):
    data = b"".join(bytes([97 + n % 26]) * (n * 7 % 90) + b"\n" for n in range(300)) + b"no end"
    (tmp_path / "m").write_bytes(data)
    for file in ((tmp_path / "m").open("rb", buffering=0), gzip.open(io.BytesIO(gzip.compress(data)))):
        lines = []
        for piece, last in tally.chunks(file, [], size):
            assert len(piece) <= size
            lines += [*piece.split(b"\n")[:-1], *([last.rstrip(b"\n")] if last else [])]
        assert b"\n".join(lines) == data
        file.close()


def test_a_stream_that_is_cut_while_it_is_opened_is_seen_whole(tmp_path, monkeypatch):
    stream = write(tmp_path / "m.ndjson", line(1, 1))
    real, calls = tally.stream_files, []

    def files(path):
        found = real(path)
        if not calls:
            os.rename(stream, tmp_path / "m.ndjson.00001")
            write(stream, line(2, 2))
        calls.append(path)
        return found

    monkeypatch.setattr(tally, "stream_files", files)
    assert one([stream])["count"] == 2


def test_a_place_without_a_stream(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no stream of metrics \(\*\.ndjson\) in"):
        summarize([tmp_path])
    with pytest.raises(FileNotFoundError, match=r"no stream of metrics at .*x\.ndjson"):
        summarize([tmp_path / "x.ndjson"])
    assert summarize([write(tmp_path / "e.ndjson")]) == []


# ---- output

@pytest.fixture
def stream(tmp_path):
    lines = [line(1, '"NaN"'), line(2, 0.1, rest=RESTS[1]), line(2, '"x"', metric='"a,\\"b\\u20ac"'), line(3, 1e-300)]
    return write(tmp_path / "m.ndjson", *lines)


def test_files_hold_the_same_rows(stream, tmp_path, capsys):
    import polars as pl
    rows = summarize([stream], lambda text: None)
    for output in ("csv", "json", "parquet"):
        summarize_to([stream], output, tmp_path / output)
    assert exact(pl.read_parquet(tmp_path / "parquet").to_dicts()) == exact(rows)
    assert [*rows[0]] == [*COLUMNS] == pl.read_parquet(tmp_path / "parquet").columns
    found = json.loads((tmp_path / "json").read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert exact([{**row, "first": float(row["first"]) if row["first"] is not None else None} for row in found]) == exact(rows)
    with (tmp_path / "csv").open(newline="") as file:
        for row, text in zip(rows, csv.DictReader(file), strict=True):
            for name, value in row.items():
                assert text[name] == ("" if value is None else str(value).replace("nan", "NaN")) or float(text[name]) == value
    assert capsys.readouterr().out == ""


def test_an_empty_summary_has_its_columns(tmp_path, capsys):
    import polars as pl
    stream = write(tmp_path / "m.ndjson")
    for output in ("csv", "json", "parquet", "table"):
        summarize_to([stream], output, tmp_path / output)
    assert tuple(pl.read_parquet(tmp_path / "parquet").columns) == COLUMNS
    assert (tmp_path / "csv").read_text() == ",".join(COLUMNS) + "\n" and json.loads((tmp_path / "json").read_text()) == []


@pytest.mark.parametrize("output", ["table", "csv", "json", "parquet"])
def test_a_file_is_written_whole_or_not_at_all(stream, tmp_path, output):
    """Under a limit on the size of files that is smaller than any of them, as near a full disk."""
    code = """
import resource, signal, sys
from pathlib import Path
from codex_ml.durable import StorageError
from codex_ml.telemetry.summary import summarize_to
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
try: summarize_to([Path(sys.argv[1])], sys.argv[2], Path(sys.argv[3]))
except StorageError: sys.exit(5)
"""
    (tmp_path / "out").write_text("before")
    done = subprocess.run([sys.executable, "-c", code, stream, output, tmp_path / "out"], stderr=subprocess.DEVNULL)
    assert done.returncode == 5 and (tmp_path / "out").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "m.ndjson"}


def test_only_the_summary_is_on_standard_output(stream, capsys):
    summarize_to([stream], "csv")
    out, err = capsys.readouterr()
    assert out.startswith("run_id,") and out.count("\n") == 4 and err == "4 records in 1 file\n"
    summarize_to([stream], "json")
    assert len(json.loads(capsys.readouterr().out)) == 3
    with pytest.raises(ValueError, match="--dest"):
        summarize_to([stream], "parquet")


def test_a_table_is_aligned_and_fits(stream):
    rows = summarize([stream], lambda text: None)
    rows.append({**rows[0], "metric": "system.memory.utilization", "run_id": "x" * 32})
    whole = table(rows)
    assert "\x1b" not in whole and "loss" in whole and max(map(len, whole.splitlines())) > 80
    starts = {text.index("train") for text in whole.splitlines()[1:]}
    assert len(starts) == 1
    for width in range(20, 140):
        text = table(rows, width)
        assert all(len(line) <= width for line in text.splitlines() if not line.startswith("(no room")), width
        assert text.splitlines()[0].split()[-1] in whole.splitlines()[0]
    assert table([]).startswith("run")


def test_runs_whose_names_begin_alike_are_told_apart(tmp_path):
    stream = write(tmp_path / "m.ndjson", line(run_id='"20261124-1"'), line(run_id='"20261124-2"'))
    assert "20261124-1" in table(summarize([stream])) and "20261124-2" in table(summarize([stream]))


def test_without_polars_the_command_that_installs_it_is_named(stream, monkeypatch):
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ImportError, match=r'pip install "codex_ml\[metrics\]"'):
        summarize([stream])


MEMORY = """
import sys
from pathlib import Path
import polars
from codex_ml.telemetry.summary import summarize
def peak(): return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1e3
before = peak()
summarize([Path(sys.argv[1])])
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_what_is_in_the_lines(tmp_path):
    """Ten times the bytes for as many records: what is kept of a record is three numbers."""
    peaks = []
    for pad in (10, 2500):
        path = tmp_path / f"{pad}.ndjson"
        with path.open("wb") as file:
            for step in range(100_000):
                file.write(encode(scalar_record("r", step, "train", "loss", step / 7, tags={"pad": "x" * pad}, timestamp=TIME)))
        peaks.append(float(subprocess.check_output([sys.executable, "-c", MEMORY, path])))
    assert peaks[1] < 200 and peaks[1] < peaks[0] + 150, peaks
