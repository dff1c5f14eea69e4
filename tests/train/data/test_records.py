import gzip
import json
import shlex
import sys

import pytest

from tunesmith.train.data import records as records_module
from tunesmith.train.data.sources import find_sources
from tunesmith.train.errors import DataError

GOOD = {"prompt": "a", "completion": "b"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def read_records(names):
    return records_module.read_records(find_sources(names))


def answer(**more):
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **more}]}


def test_reads_both_forms_with_their_places(write_jsonl):
    completion = write_jsonl([GOOD, b"", GOOD], "one.jsonl")
    chat = write_jsonl([answer(weight=0.5, tool_calls=[{"id": "x"}])], "two.jsonl")
    records = read_records([completion, chat])
    assert [record.place for record in records] == [f"{completion}:1", f"{completion}:3", f"{chat}:1"]
    assert [(message.role, message.content) for message in records[0].messages] == [("user", "a"), ("assistant", "b")]
    assert records[2].messages[1].weight == 0.5
    assert records[2].messages[1].as_dict() == {"role": "assistant", "content": "b", "tool_calls": [{"id": "x"}]}


def test_reads_gz_folders_and_globs_in_a_fixed_order(tmp_path):
    for name, text in (("b.jsonl", "b"), ("a.jsonl", "a")):
        (tmp_path / name).write_text(f'{{"prompt": "{text}", "completion": "x"}}\n')
    with gzip.open(tmp_path / "c.jsonl.gz", "wb") as file:
        file.write(b'{"prompt": "c", "completion": "x"}\n')
    (tmp_path / "notes.txt").write_text("not data")
    for source in (str(tmp_path), str(tmp_path / "*.jsonl*")):
        assert [record.messages[0].content for record in read_records([source])] == ["a", "b", "c"]


def test_brackets_in_the_name_of_a_folder_are_no_pattern(write_jsonl, tmp_path):
    (tmp_path / "run [1]").mkdir()
    path = write_jsonl([GOOD], "run [1]/a.jsonl")
    assert [source.name for source in find_sources([str(tmp_path / "run [1]/*.jsonl")])] == [str(path)]


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n\r\n{"prompt": "c", "completion": "d"}\r\n')
    assert [record.messages[1].content for record in read_records([str(path)])] == ["b", "d"]


def test_other_fields_are_ignored(write_jsonl):
    (record,) = read_records([write_jsonl([{**GOOD, "id": 7, "metadata": {"x": 1}, "intent": "refund"}])])
    assert record.messages[1].content == "b"


BAD_ROWS = [
    (b"{nope}", "not JSON: "),
    (b'[{"prompt": "a"}]', "not a JSON object but a list"),
    (b'{"prompt": "a", "completion": "\xff"}', "not UTF-8 at byte 32 of the line (0xff)"),
    (b'{"prompt": "a\x00", "completion": "b"}', "NUL bytes; the file is not UTF-8 text, or was damaged"),
    ({"prompt": "a\0", "completion": "b"}, "prompt: contains a NUL character"),
    ({"prompt": 12, "completion": "b"}, "prompt: must be a string, not 12"),
    ({"prompt": "a", "completion": None}, "completion: must be a string, not null"),
    ({"prompt": "a"}, "completion: missing"),
    ({"prompt": "a", "completion": " \n"}, "completion: empty, so there is nothing to learn"),
    ({"prompt": "a", "completion": "\u200b\u2060\ufeff"}, "completion: empty, so there is nothing to learn"),
    ({"prompt": "", "completion": "b"}, "prompt: empty, so there is nothing to answer"),
    ({"prompt": "\u00ad \n", "completion": "b"}, "prompt: empty, so there is nothing to answer"),
    ({"prompt": "\U0001d173\U0001bca0\U00013430\ufff0", "completion": "b"}, "prompt: empty, so there is nothing to"),
    ({"prompt": "a", "completoin": "b"}, "completoin: unknown field; did you mean 'completion'?"),
    ({**GOOD, "system": "be kind"}, "system: not a field of prompt/completion rows"),
    ({**GOOD, "weight": 1}, "weight: not a field of prompt/completion rows"),
    (CHAT, "messages: this file's rows have prompt and completion, this one has messages"),
]


@pytest.mark.parametrize(("row", "problem"), BAD_ROWS)
def test_a_bad_row_is_named_with_file_line_and_field(row, problem, write_jsonl):
    path = write_jsonl([GOOD, row, GOOD])
    with pytest.raises(DataError) as caught:
        read_records([path])
    assert caught.value.what.startswith(f"{path}:2: {problem}")
    assert caught.value.do


def chat_of(*messages):
    return {"messages": list(messages)}


def call_with(arguments):
    return answer(tool_calls=[{"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}}])


def nested(levels):
    return json.loads('{"a":' * levels + "1" + "}" * levels)


SYSTEM = {"role": "system", "content": "be kind"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "4711"}

BAD_CHATS = [
    ({"messages": "a"}, "messages: must be a list, not the text 'a'"),
    ({"messages": []}, "messages: no assistant message, so there is nothing to learn"),
    (chat_of({"role": "user", "content": "a"}), "messages: no assistant message, so there is nothing to learn"),
    (answer(weight=0), "messages: every assistant message has weight 0, so there is nothing to learn"),
    (chat_of("a"), "messages[0]: must be an object, not the text 'a'"),
    (chat_of({"content": "a"}), "messages[0].role: missing"),
    (chat_of({"role": "robot", "content": "a"}), "messages[0].role: unknown role 'robot'"),
    (chat_of({"role": ["user"], "content": "a"}), "messages[0].role: unknown role ['user']"),
    (chat_of({"role": "user"}), "messages[0].content: missing"),
    (chat_of({"role": "user", "content": ["a"]}), "messages[0].content: must be a string, not a list"),
    (chat_of({"role": "user", "content": " "}), "messages[0].content: empty"),
    (
        chat_of({"role": "user", "content": "a", "weight": 1}),
        "messages[0].weight: on a user message, which is never learned",
    ),
    (answer(weight=True), "messages[1].weight: must be a number, not true"),
    (answer(weight="1"), "messages[1].weight: must be a number, not the text '1'"),
    (answer(weight=-0.5), "messages[1].weight: must be at least 0, not -0.5"),
    (answer(weight=1e39), "messages[1].weight: does not fit into float32: 1e+39"),
    (answer(wieght=1), "messages[1].wieght: unknown field; did you mean 'weight'?"),
    (GOOD, "prompt: this file's rows have messages, this one has prompt, completion"),
    (answer(content="\u200d\u3164"), "messages[1].content: empty"),
    (chat_of(SYSTEM, SYSTEM, *CHAT["messages"]), "messages[1].role: a second system message"),
    (chat_of(*CHAT["messages"], SYSTEM), "messages[2].role: a system message that is not the first"),
    (
        chat_of({**SYSTEM, "role": "developer"}, SYSTEM, *CHAT["messages"]),
        "messages[1].role: a system message that is not the first",
    ),
    (chat_of(RESULT, *CHAT["messages"]), "messages[0]: a tool's result without its call"),
    (chat_of(*CHAT["messages"], RESULT), "messages[2]: a tool's result without its call"),
    (
        chat_of(CALL, {**RESULT, "tool_call_id": "z"}),
        "messages[1]: a tool's result without its call (tool_call_id 'z')",
    ),
    (chat_of(CALL, RESULT, RESULT), "messages[2]: a tool's result without its call"),
    (chat_of(CALL, *CHAT["messages"], RESULT), "messages[3]: a tool's result without its call"),
    (answer(tool_calls="f()"), "messages[1].tool_calls: must be a list of objects"),
    *(
        (
            chat_of({**message, "tool_calls": calls}, *CHAT["messages"]),
            f"messages[0].tool_calls: on a {message['role']} message, which calls nothing",
        )
        for message, calls in [(CHAT["messages"][0], [1]), (SYSTEM, {"id": "x"}), (RESULT, "abc"), (SYSTEM, 5)]
    ),
    (chat_of({**SYSTEM, "content": "\u200b"}, *CHAT["messages"]), "messages[0].content: nothing that can be seen"),
    (
        chat_of(CALL, RESULT, CHAT["messages"][1]),
        "messages: nothing is asked: no message that is not the assistant's or a tool's",
    ),
    (
        call_with('{"nope": '),
        "messages[1].tool_calls[0]: arguments are no JSON object: unexpected end of data at column 10",
    ),
    (call_with("[1]"), "messages[1].tool_calls[0]: arguments are no JSON object: JSON, but no object"),
    (call_with(nested(300)), "messages[1]: nested more than 64 levels deep"),
    ({**CHAT, "tools": [nested(300)]}, "tools: nested more than 64 levels deep"),
    ({**CHAT, "tools": "search"}, "tools: must be a list of JSON schemas, not the text 'search'"),
]


@pytest.mark.parametrize(("row", "problem"), BAD_CHATS)
def test_a_bad_conversation_is_named_with_file_line_and_field(row, problem, write_jsonl):
    path = write_jsonl([CHAT, json.dumps(row).encode()])
    with pytest.raises(DataError) as caught:
        read_records([path])
    assert caught.value.what == f"{path}:2: {problem}"


def test_conversations_with_instructions_and_tools_are_taken(write_jsonl):
    """Two calls answered in another order, by ids; one answered without; instructions of both kinds."""
    two = {**CALL, "tool_calls": [{"id": name, "function": {"name": "f", "arguments": ""}} for name in "xy"]}
    results = [{**RESULT, "tool_call_id": name} for name in "yx"]
    conversations = [
        chat_of(SYSTEM, {**SYSTEM, "role": "developer", "content": ""}, *CHAT["messages"]),
        chat_of(CHAT["messages"][0], two, *results, CHAT["messages"][1]),
        chat_of(CHAT["messages"][0], CALL, RESULT, CALL, RESULT, CHAT["messages"][1]),
    ]
    assert len(read_records([write_jsonl(conversations)])) == 3


def test_the_arguments_of_a_call_are_an_object_in_either_form(write_jsonl):
    forms = [{"n": 1, "é": [1.5, None]}, '{"n":1,  "\\u00e9": [1.5,null]}']
    records = read_records([write_jsonl([call_with(form) for form in [*forms, ""]])])
    found = [record.messages[1].extra["tool_calls"][0]["function"]["arguments"] for record in records]
    assert found == [forms[0], forms[0], {}]


def test_nan_is_not_a_weight(write_jsonl):
    row = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": NaN}]}'
    with pytest.raises(DataError, match=r"data.jsonl:1: not JSON"):
        read_records([write_jsonl([row])])


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"promt": "a", "completion_": "b"}, "promt: unknown field; did you mean 'prompt'?"),
        ({"text": "a"}, "neither messages nor prompt and completion, but text"),
        ({**GOOD, **CHAT}, "prompt: not a field of messages rows"),
    ],
)
def test_the_first_row_tells_the_form(row, problem, write_jsonl):
    path = write_jsonl([row])
    with pytest.raises(DataError) as caught:
        read_records([path])
    assert caught.value.what.startswith(f"{path}:1: {problem}")


def test_five_bad_rows_are_shown_and_all_are_counted(write_jsonl):
    path = write_jsonl([GOOD] + [{"prompt": index, "completion": "b"} for index in range(7)])
    with pytest.raises(DataError) as caught:
        read_records([path])
    lines = str(caught.value).splitlines()
    assert lines[0] == "DataError: 7 bad rows, the first 5:"
    assert lines[1:6] == [f"  {path}:{index + 2}: prompt: must be a string, not {index}" for index in range(5)]
    assert lines[6] == "  do: write the text as one string."


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("missing.jsonl", "there is no file or folder {source}."),
        ("*.jsonl", "no file matches {source}."),
        ("", "the folder {source} holds no .jsonl or .jsonl.gz file."),
    ],
)
def test_sources_that_are_not_there(source, problem, tmp_path):
    source = str(tmp_path / source) if source else str(tmp_path)
    with pytest.raises(DataError) as caught:
        read_records([source])
    assert caught.value.what == problem.format(source=source)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_error(content, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"empty.jsonl has no rows"):
        read_records([str(path)])


ROW = b'{"prompt": "a", "completion": "b"}\n'
TEXT = ROW.decode() * 3
FOREIGN = {
    "UTF-16 text": TEXT.encode("utf-16"),
    "UTF-16 text without a byte order mark": TEXT.encode("utf-16-be"),
    "UTF-32 text": TEXT.encode("utf-32"),
    "CSV": b'prompt,completion\n"Hello, you",fine\n',
    "CSV with semicolons": b'"prompt";"completion"\r\na;b\r\n',
    "tab-separated columns": b"prompt\tcompletion\na\tb\n",
    "a page of HTML or XML": b"\n<!DOCTYPE html>\n<html><body>Log in</body></html>\n",
    "the pointer that git LFS keeps in place of a file": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "compressed with gzip": gzip.compress(ROW, mtime=0),
    "compressed with zstd": b"\x28\xb5\x2f\xfd\x04\x58",
    "a zip archive, or an office document": b"PK\x03\x04\x14\x00",
    "a Parquet file": b"PAR1\x15\x04",
    "one JSON array": b'[{"prompt": "a", "completion": "b"},\n{"prompt": "a", "completion": "b"}]\n',
    "JSON over several lines": b'{\n  "prompt": "a",\n  "completion": "b"\n}\n',
    "a JSON array on each line": b'["a", "b"]\n["c", "d"]\n',
    "columns separated by |": b"prompt|completion\na|b\n",
    "a tar archive": b"data.jsonl".ljust(257, b"\0") + b"ustar\x0000" + bytes(249) + ROW,
    "text": b"- prompt: a\n  completion: b\n",
    "binary data": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
}
OTHERS = [
    ("CSV", b",prompt,completion\n0,a,b\n1,c,d\n"),  # of df.to_csv()
    ("CSV", "prompt,réponse\na,b\n".encode()),
    ("CSV", "prompt,réponse\na,b\n".encode("latin-1")),
    ("CSV", b'Prompt (user),Answer?\n"a\nb, c",d\n"cut, in'),
    ("a page of HTML or XML", b"<div class='x'>\nLog in, please\n</div>\n"),
    ("a page of HTML or XML", b"<table>\n<tr><td>a</td></tr>"),
    ("UTF-16 text without a byte order mark", '{"prompt": "一日本", "completion": "Да"}\n'.encode("utf-16-le")),
    ("UTF-16 text without a byte order mark", ("вопрос,ответ\n" + "да,нет\n" * 9).encode("utf-16-be")),
    ("a page of HTML or XML", b"<html>\n<style>\n{ color: red }\n</style>"),
    ("CSV", b"prompt,answer\na\0,b\n"),  # damaged, not UTF-16
    ("text", b"Hello, you\nwho read, and write, and hear\n"),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "content"), [*FOREIGN.items(), *OTHERS])
def test_a_file_that_is_no_json_lines_is_named_once_for_what_it_is(kind, content, packed, tmp_path):
    path = tmp_path / ("my data.jsonl.gz" if packed else "my data.jsonl")
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    with pytest.raises(DataError) as caught:
        read_records([str(path)])
    assert caught.value.what == f"{path} is {kind}, not JSON Lines."
    if ">" in caught.value.do:  # which would empty the file itself
        assert shlex.split(caught.value.do)[-1] == str(path.with_suffix(".new.jsonl"))


SPREAD_OUT = [
    b'{"prompt": "a",\n "completion": "b"}\n',
    b'{"data": [\n{"prompt": "a", "completion": "b"}\n]}\n',
    b'\xef\xbb\xbf{\n"prompt": "' + b"a" * 70_000 + b'",\n"completion": "b"}\n',
    b'{"prompt": "a",\n"completion": "' + b"a" * 70_000 + b'"}\n',
    b'{"version": 1, "train set": [\n' + b'{"prompt": "a", "completion": "b"},\n' * 3000 + b'{"prompt": "a"}]}\n',
    b'{"messages": [\n{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
]
OBJECTS = [".", "'.data[]'", ".", ".", """'."train set"[]'""", "."]


@pytest.mark.parametrize(("content", "rows"), [*zip(SPREAD_OUT, OBJECTS, strict=True)], ids=range(len(OBJECTS)))
def test_json_over_several_lines_in_other_ways(content, rows, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"is JSON over several lines, not JSON Lines\.") as caught:
        read_records([str(path)])
    assert caught.value.do == f"jq -c {rows} {path} > {tmp_path}/data.new.jsonl"


def test_arrays_on_lines_are_told_apart_and_a_remedy_names_the_file_that_is_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    remedies = {
        b'["a", "b"]\n["c", "d"]\n': "{prompt: .[0], completion: .[1]}",
        b'[{"role": "user", "content": "a"}]\n' * 2: "{messages: .}",
        b'[{"prompt": "a"}]\n' * 2: ".[]",
    }
    for content, rows in remedies.items():
        (tmp_path / "d.csv").write_bytes(content)
        with pytest.raises(DataError) as caught:
            read_records(["~/d.csv"])
        assert caught.value.do == f"jq -c '{rows}' {tmp_path}/d.csv > {tmp_path}/d.new.jsonl"


BAD_FIRST = [b'{"prompt": "a", "completion": \n', b"prose, with commas\n", b'{"prompt": "\xff"}\n', b"<p>\n"]
BAD_FIRST += [b'{"prompt": "a", "completion": \n{"prompt": "' + b"a" * 70_000 + b'", "completion": "b"}\n']


@pytest.mark.parametrize("first", BAD_FIRST)
def test_a_bad_first_row_is_a_bad_row_only(first, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(first + ROW * 3)
    with pytest.raises(DataError, match=r"data\.jsonl:1: not "):
        read_records([str(path)])


def test_a_pointer_under_the_name_of_a_packed_file_is_named(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(FOREIGN["the pointer that git LFS keeps in place of a file"])
    with pytest.raises(DataError, match="git LFS") as caught:
        read_records([str(path)])
    assert caught.value.do == "git lfs pull"


def test_a_damaged_gz_file_is_an_error(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 50, mtime=0)[:-20])
    with pytest.raises(DataError, match=r"data.jsonl.gz can't be read"):
        read_records([str(path)])


def test_a_file_given_twice_is_an_error(write_jsonl, tmp_path):
    path = write_jsonl([GOOD])
    with pytest.raises(DataError, match="is given twice"):
        read_records([path, str(tmp_path)])


def test_a_hub_dataset_without_the_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError) as caught:
        read_records(["hub:org/name"])
    assert caught.value.do == "pip install 'tunesmith[hub]'."


def test_a_hub_dataset_is_read_by_its_columns(monkeypatch):
    class Rows(list):
        _fingerprint = "f"

    rows = Rows([{"id": 1, "prompt": "a", "messages": CHAT["messages"], "system": "x"}])
    monkeypatch.setattr("tunesmith.train.data.sources._load_dataset", lambda dataset_id, split: rows)
    (record,) = read_records(["hub:org/name:test"])
    assert record.place == "hub:org/name:test:0"
    assert record.form == "messages"
