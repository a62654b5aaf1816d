import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline import json_stream
from data_pipeline.json_stream import stream_object
from dino_scale.errors import DataError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def collect(path: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in stream_object(path):
        if isinstance(found.get(key), list):
            found[key].append(value)
        else:
            found[key] = [] if value is None else value
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.dictionaries(st.text(), st.lists(values, max_size=5), max_size=4),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 2]),
)
def test_equals_reading_at_once_however_the_text_is_cut(tmp_path, monkeypatch, content, chunk, indent) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content, indent=indent), encoding="utf-8")
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    assert collect(path) == content


def test_plain_values_pass_too(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(' {"info": {"year": 2017}, "images": [1, 22], "n": 12} ')
    assert list(stream_object(path)) == [
        ("info", {"year": 2017}),
        ("images", None),
        ("images", 1),
        ("images", 22),
        ("n", 12),
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected '{'"),
        ("[1]", "expected '{'"),
        ('{"a": [1,', "Expecting value"),
        ('{"a": [1 2]}', "expected ']'"),
        ('{"a": 1} x', "expected the end"),
        ('{"a": 1, "a": 2}', "key 'a' occurs twice"),
        ('{"a": [{"b": 1}, {"b": 1, "c": 2, "b": 1}]}', "key 'b' occurs twice within the element"),
        ('{"a": [{"b": {"c": [{"d": 1, "d": 2}]}}]}', "key 'd' occurs twice within the element"),
        ('{"a": {"b": 1, "b": 1}}', "key 'b' occurs twice within the element"),
        ('{"a": [{"' + "k" * 500 + '": 1, "' + "k" * 500 + '": 2}]}', "kkk...' occurs twice"),
        ('{"a": "abc', "Unterminated string"),
        ('{1: 2}', "expected a key"),
        ('{"a": ' + "[" * 100_000 + "}", "recursion"),
    ],
)  # fmt: skip
def test_broken_text_is_one_clear_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"broken\.json: is not valid JSON near character \d+") as caught:
        list(stream_object(path))
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_equal_keys_of_different_objects_are_no_repetition(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": [{"b": {"b": 1}}, {"b": 2}], "b": {"a": {"a": 1}}}')
    assert collect(path) == {"a": [{"b": {"b": 1}}, {"b": 2}], "b": {"a": {"a": 1}}}


@pytest.mark.parametrize("chunk", [1, 7, 30])
def test_a_repeated_key_is_seen_however_the_text_is_cut(tmp_path: Path, monkeypatch, chunk: int) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    path = tmp_path / "x.json"
    path.write_text('{"annotations": [{"id": 1, "bbox": [0, 0, 2, 2]}, {"id": 2, "bbox": [1], "area": 3, "bbox": []}]}')
    with pytest.raises(DataError, match=r"near character 50 \(key 'bbox' occurs twice"):
        list(stream_object(path))


def test_an_endless_element_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", 100)
    monkeypatch.setattr(json_stream, "LONGEST_ELEMENT", 1000)
    path = tmp_path / "x.json"
    path.write_text('{"a": ["' + "x" * 100_000 + '"]}')
    with pytest.raises(DataError, match="no complete value within 1000 characters"):
        list(stream_object(path))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(DataError, match="not UTF-8"):
        list(stream_object(path))
