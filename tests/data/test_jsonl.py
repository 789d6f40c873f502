"""Your own files: keys, canonical answers, and errors that name file and line."""

import json
import re

import pytest

from rolltune.data.jsonl import jsonl


def write(tmp_path, *lines, name="own.jsonl"):
    path = tmp_path / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return str(path)


def test_records_become_problems(tmp_path):
    path = write(tmp_path, {"question": "2 + 2?", "answer": " 4 "}, "", {"question": "Où ?", "answer": "là"})
    first, second = jsonl(path=path)
    assert first.messages == ({"role": "user", "content": "2 + 2?"},)
    assert (first.id, first.answer, first.solution) == ("own/1", "4", None)
    # The empty line counts, so that the id is the line number that an editor shows.
    assert (second.id, second.messages[0]["content"], second.answer) == ("own/3", "Où ?", "là")


def test_other_keys(tmp_path):
    row = {"q": "2 + 2?", "gold": "4", "key": 17, "cot": " 2 + 2 = 4. "}
    (problem,) = jsonl(path=write(tmp_path, row), question_key="q", answer_key="gold", id_key="key", solution_key="cot")
    assert (problem.id, problem.answer, problem.solution) == ("17", "4", "2 + 2 = 4.")


@pytest.mark.parametrize(("answer", "expected"), [(4, "4"), (-3.0, "-3"), (0.5, "0.5"), ("1,800", "1,800")])
def test_answers(tmp_path, answer, expected):
    assert jsonl(path=write(tmp_path, {"question": "?", "answer": answer}))[0].answer == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [("1e23", "1" + "0" * 23), ("1E-7", "0.0000001"), ("9007199254740993.0", "9007199254740993"), ("-0.0", "0"),
     ("12345678901234567.50", "12345678901234567.5"), ("100", "100"), ("2.50e3", "2500"), ("-1.5e-3", "-0.0015")],
)  # fmt: skip
def test_numbers_keep_their_digits(tmp_path, written: str, expected: str):
    path = write(tmp_path, f'{{"question": "?", "answer": {written}}}')
    assert jsonl(path=path)[0].answer == expected


def test_data_without_answers(tmp_path):
    assert jsonl(path=write(tmp_path, {"question": "Write a poem."}), answer_key=None)[0].answer is None


def test_conversations(tmp_path):
    messages = [
        {"role": "system", "content": "Be short.", "weight": 0},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "2 + 2?"},
    ]
    (problem,) = jsonl(path=write(tmp_path, {"messages": messages, "answer": "4"}), messages_key="messages")
    assert problem.messages == tuple({"role": t["role"], "content": t["content"]} for t in messages)


def test_whole_surrogate_pairs_are_characters(tmp_path):
    assert (
        jsonl(path=write(tmp_path, r'{"question": "\ud83d\ude00", "answer": "1"}'))[0].messages[0]["content"]
        == "\U0001f600"
    )


def test_keys_inside_objects(tmp_path):
    """The layout of DAPO-Math-17k, and a key with a dot in its own name."""
    row = {"prompt": [{"role": "user", "content": "2 + 2?"}], "reward_model": {"ground_truth": "4", "style": "rule"}}
    path = write(tmp_path, row | {"a.b": "5"})
    (problem,) = jsonl(path=path, messages_key="prompt", answer_key="reward_model.ground_truth")
    assert (problem.messages[0]["content"], problem.answer) == ("2 + 2?", "4")
    assert jsonl(path=path, messages_key="prompt", answer_key="a.b")[0].answer == "5"


def test_slices(tmp_path):
    path = write(tmp_path, *({"question": f"q{i}", "answer": i} for i in range(5)))
    assert [p.answer for p in jsonl(path=path, start=1, count=2)] == ["1", "2"]
    with pytest.raises(ValueError, match="count=9"):
        jsonl(path=path, count=9)


def test_byte_order_mark_and_line_separators_inside_strings(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"question": "a\u2028b", "answer": "1"}\r\n'.encode())
    assert jsonl(path=str(path))[0].messages[0]["content"] == "a\u2028b"


GOOD = {"question": "2 + 2?", "answer": "4"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"question": "a"', "not JSON"),
        ("[1, 2]", "not list"),
        ({"question": "a"}, "'answer'"),
        ({"question": "", "answer": "1"}, "'question' .*not ''"),
        ({"question": 3, "answer": "1"}, "'question' .*not 3"),
        ({"question": "a", "answer": None}, "'answer' .*not None"),
        ({"question": "a", "answer": True}, "not True"),
        ('{"question": "a", "answer": NaN}', "not nan"),
        (f'{{"question": "a", "answer": "1", "other": {"7" * 5000}}}', "a number is too long"),
        (f'{{"question": "a", "answer": "1", "other": {"[" * 200_000}{"]" * 200_000}}}', "nested too deeply"),
        (r'{"question": "Add \ud83d 2", "answer": "1"}', "half of a surrogate pair, .*ud83d"),
        (r'{"question": "a", "answer": "1", "\uDE00": 1}', "half of a surrogate pair, .*ude00"),
        ('{"question": "a", "answer": "1", "answer": "2"}', "the key 'answer' is repeated"),
        ('{"question": "a", "answer": "1", "meta": {"x": 1, "x": 1}}', "the key 'x' is repeated"),
        ({"question": "\u200b\u2060", "answer": "1"}, "'question' must be a non-empty string"),
        ({"question": "a", "answer": "\ufeff"}, "'answer' must be a non-empty string"),
        ('{"question": "a", "answer": 1e999}', "not inf"),
        ('[{"question": "a",', "a JSON array; write one JSON object per line"),
        ({"question": "a", "meta": {"gold": "1"}}, "no key 'answer'; the record has 'question', 'meta', 'meta.gold'"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_malformed_records_name_file_and_line(tmp_path, bad, message):
    path = write(tmp_path, GOOD, bad)
    with pytest.raises(ValueError, match=f"{re.escape(path)}:2: .*{message}"):
        jsonl(path=path)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi", "'messages' must be a list"),
        ([], "'messages' must be a list"),
        ([{"role": "tool", "content": "x"}], "message 0 of 'messages' .*role"),
        ([{"role": "user"}], "message 0: .*'content'"),
        ([{"role": "assistant", "content": "x"}], "user message, not with 'assistant'"),
    ],
)
def test_malformed_conversations(tmp_path, messages, message):
    path = write(tmp_path, {"messages": messages, "answer": "4"})
    with pytest.raises(ValueError, match=f":1.*{message}"):
        jsonl(path=path, messages_key="messages")


def test_not_utf8(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(b'{"question": "a", "answer": "1"}\n{"question": "\xff", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"own\.jsonl:2: not UTF-8"):
        jsonl(path=str(path))


def test_duplicate_ids_name_both_lines(tmp_path):
    path = write(tmp_path, GOOD | {"key": "a"}, GOOD | {"key": "b"}, GOOD | {"key": "a"})
    with pytest.raises(ValueError, match=r"own\.jsonl:3: .*'a' .*own\.jsonl:1"):
        jsonl(path=path, id_key="key")


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match=r"jsonl: path='.*nowhere\.jsonl'"):
        jsonl(path=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="no records"):
        jsonl(path=write(tmp_path, ""))
