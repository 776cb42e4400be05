"""Reading files: each is taken for what it is, by one rule for all; what is left out is counted; errors say where."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import os
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ringflash.configs.schema import DataConfig
from ringflash.errors import DataError
from ringflash.training.corpus import building
from ringflash.training.corpus.passed_over import EMPTY, HIDDEN, READ_ALREADY, SPECIAL, WITHOUT_TEXT, PassedOver
from ringflash.training.corpus.prepare import prepare
from ringflash.training.corpus.reading import read_documents
from ringflash.training.corpus.sources import source_files


def read(file, field="text"):
    """Documents as strings, and how many of each kind were left out."""
    passed_over = PassedOver()
    documents = [document.decode() for document in read_documents(file, field, passed_over)]
    return documents, {kind: number for kind, (number, _) in passed_over.counts.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("read")


# Kinds of files, compressions, encodings

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}
MARKED = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


def encoded(text, encoding):
    return MARKED[encoding] + text.encode(encoding)


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


WRITERS = {
    "jsonl": json_lines,
    "ndjson": lambda rows: "\n\n".join(map(json.dumps, rows)),
    "json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=1),
    "json of one line": json.dumps,
    "json of lines": json_lines,
}

# A mark inside of a text is a character of it; at its beginning it is none.
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=12)


@given(
    texts=st.lists(any_text, min_size=1, max_size=4),
    kind=st.sampled_from([*WRITERS, "parquet"]),
    compression=st.sampled_from([*COMPRESS]),
    encoding=st.sampled_from([*MARKED]),
    upper=st.booleans(),
)
def test_rows_are_read_from_any_file_by_its_name_in_any_case_compression_and_encoding(
    folder, texts, kind, compression, encoding, upper
):
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    if kind == "parquet":
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        data = sink.getvalue().to_pybytes()
    else:
        data = encoded(WRITERS[kind](rows), encoding)
    name = f"a.{kind.split()[0]}{compression}"
    file = folder / (name.upper() if upper else name)
    file.write_bytes(COMPRESS[compression](data))
    without = texts.count("")
    assert read(file) == ([text for text in texts if text], {WITHOUT_TEXT: without} if without else {})


@given(
    text=any_text, compression=st.sampled_from([*COMPRESS]), encoding=st.sampled_from([*MARKED]), plain=st.booleans()
)
@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a", "a.md"])
def test_a_text_file_is_one_document_without_its_byte_order_mark(folder, name, text, compression, encoding, plain):
    file = folder / (name if plain else name + compression)  # what is compressed may have another name
    file.write_bytes(COMPRESS[compression](encoded(text, encoding)))
    assert read(file) == ([text] if text else [], {} if text else {EMPTY: 1})


def test_one_object_in_a_json_file_is_one_document(tmp_path):
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps({"text": "one\ntwo", "meta": {"n": {}}}, indent=indent))
        assert read(tmp_path / "a.json") == (["one\ntwo"], {})


def test_files_that_were_joined_keep_no_marks_and_no_borders(tmp_path):
    line = '{"text": "a"}\n'.encode("utf-8-sig")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line) + gzip.compress(line))
    assert read(tmp_path / "a.jsonl.gz") == (["a", "a"], {})
    (tmp_path / "a.txt.zst").write_bytes(2 * pyarrow.compress(b"abc", codec="zstd", asbytes=True))
    assert read(tmp_path / "a.txt.zst") == (["abcabc"], {})


@pytest.mark.parametrize("name", ["a.jsonlines", "part-00000", "a.jsonl.1", "a.jl", "a.jsonl.gzip", "a.gz"])
def test_rows_by_another_name_are_no_text_unless_it_says_so(tmp_path, name):
    rows = json_lines([{"text": "x"}, {"text": "y"}])
    content = gzip.compress(rows.encode()) if "gz" in name else rows.encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        DataError, match=rf"{name} holds rows of JSON with data.text_field=text; name it .jsonl, or .txt"
    ):
        read(tmp_path / name, "text")
    (tmp_path / name).rename(tmp_path / "a.txt")
    assert read(tmp_path / "a.txt", "text") == ([rows], {})
    (tmp_path / "log").write_text('{"level": "info"}\n')  # rows of something else are text as any other
    assert read(tmp_path / "log", "text")[0] == ['{"level": "info"}\n']
    (tmp_path / "part-1").write_text(json.dumps({"messages": []}))
    with pytest.raises(DataError, match="part-1 holds chats"):
        read(tmp_path / "part-1", "text")


# One rule for all kinds of rows

rows_of = st.lists(st.one_of(st.just("absent"), st.none(), st.just(""), st.sampled_from(["x", "é\n"])), max_size=6)


def _record(value, field):
    """A row whose field holds the value; of a field within others, what holds it may be absent or null as well."""
    record = {"id": "1"}
    if field == "a.b" or "." not in field:
        return record if value == "absent" else record | {field: value}
    outer, inner = field.split(".")
    if value == "absent":
        return record | {outer: {"n": 2}}
    return record | {outer: {"n": 2, inner: value}}


def _table(values, field):
    column = pyarrow.array([None if value == "absent" else value for value in values], pyarrow.string())
    if field == "a.b" or "." not in field:
        return pyarrow.table({"id": ["1"] * len(values), field: column})
    outer, inner = field.split(".")
    struct = pyarrow.StructArray.from_arrays([pyarrow.array([2] * len(values)), column], ["n", inner])
    return pyarrow.table({"id": ["1"] * len(values), outer: struct})


@given(values=rows_of, field=st.sampled_from(["text", "meta.text", "a.b"]))
def test_a_row_without_text_is_passed_over_alike_in_every_kind_of_file(folder, values, field):
    jsonl, whole, parquet = (folder / f"same.{suffix}" for suffix in ("jsonl", "json", "parquet"))
    records = [_record(value, field) for value in values]
    jsonl.write_text(json_lines(records))
    whole.write_text(json.dumps(records))
    pyarrow.parquet.write_table(_table(values, field), parquet)
    texts = [value for value in values if value not in ("absent", None, "")]
    counts = {WITHOUT_TEXT: len(values) - len(texts)} if len(texts) < len(values) else {}
    counts = counts if values else {EMPTY: 1}
    assert read(parquet, field) == (texts, counts)
    for file in (jsonl, whole):
        if values and set(values) == {"absent"}:  # in parquet a column would be missing
            with pytest.raises(
                DataError, match=rf"no row of .*{file.name} has data.text_field={field}; its fields are id"
            ):
                read(file, field)
        else:
            assert read(file, field) == (texts, counts)


def test_what_holds_a_field_may_be_null_or_absent_too(tmp_path):
    rows = [{"meta": None}, {"meta": {"text": "x"}}, {}]
    (tmp_path / "a.jsonl").write_text(json_lines(rows))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"meta": None}, {"meta": {"text": "x"}}]), tmp_path / "a.parquet"
    )
    assert read(tmp_path / "a.jsonl", "meta.text") == (["x"], {WITHOUT_TEXT: 2})
    assert read(tmp_path / "a.parquet", "meta.text") == (["x"], {WITHOUT_TEXT: 1})


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(["x", None, "é"], pyarrow.large_string()),
        pyarrow.array(["x", None, "é"], pyarrow.string_view()),
        pyarrow.array(["x", None, "é"]).dictionary_encode(),
    ],
    ids=lambda column: str(column.type).split("<")[0],
)
def test_every_kind_of_text_column_is_read(tmp_path, column):
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (["x", "é"], {WITHOUT_TEXT: 1})


def test_a_column_of_nulls_alone_is_rows_without_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.nulls(3)}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ([], {WITHOUT_TEXT: 3})


CHATS = [
    [{"messages": [{"role": "user", "content": "hello"}]}],
    [{"prompt": "2 + 2 =", "completion": " 4"}],
    [{"conversations": [{"from": "human", "value": "hello"}], "id": 3}],
]


@pytest.mark.parametrize("rows", CHATS, ids=lambda rows: "-".join(rows[0]))
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_chats_are_refused_in_a_sentence_of_their_own_that_says_what_can_be_done(tmp_path, rows, suffix):
    file = tmp_path / f"chat.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text(json_lines(rows))
    named = " and ".join(name for name in rows[0] if name != "id")
    for field in ("text", "messages") if "messages" in rows[0] else ("text",):
        with pytest.raises(
            DataError, match=rf"chat\.{suffix}.* holds chats \({named}\); data=chat learns what their assistant says"
        ):
            read(file, field)


def test_a_prompt_may_be_learned_as_plain_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines(CHATS[1]))
    assert read(tmp_path / "a.jsonl", "completion") == ([" 4"], {})


# Errors name the file, the row, the field, and what to do

WRONG = [
    ("a.jsonl", b'{"text": "x"}\n{"text": 3}', r"a\.jsonl, line 2: data\.text_field=text is a number; name a field"),
    ("a.jsonl", b'{"text": ["x"]}', r"line 1: data\.text_field=text is a list; name a field of text"),
    ("a.jsonl", b'{"text": {"x": 1}}', r"line 1: data\.text_field=text is an object"),
    ("a.jsonl", b'{"text": true}', r"line 1: data\.text_field=text is true or false"),
    ("a.jsonl", b'"text"', r"line 1 is text; allowed are objects with a field of text"),
    ("a.jsonl", b"null", r"line 1 is null; allowed are objects"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', r"a\.jsonl, line 2 is not UTF-8 text: byte 0xff at 10"),
    ("a.jsonl", b'{"text": "a", "n": 1, "text": "b"}', r"line 1 has 2 fields text; keep one of them"),
    ("a.jsonl", b"[" * 100_000, r"line 1 nests deeper than Python's JSON reader goes; flatten it"),
    ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", r"line 1 cannot be read as JSON: Exceeds the limit"),
    ("a.jsonl", b'{\n "text": "x"\n}', r"line 1 cannot be read as JSON: .*; each line must hold one object"),
    ("a.ndjson", b'{"text": "x"}{"text": "y"}', r"a\.ndjson, line 1 cannot be read as JSON: Extra data.*one object"),
    ("a.json", b'[{"text": "x"}, 5]', r"a\.json, object 2 is a number; allowed are objects"),
    ("a.json", b'["x"]', r"a\.json, object 1 is text; allowed are objects"),
    ("a.json", b'\n\n[{"text": "x"},\n]', r"a\.json cannot be read as JSON: .*line 4.*; allowed are an object, a list"),
    ("a.json", b"[" * 100_000, r"a\.json nests deeper"),
    ("a.json", b"", r"a\.json is empty; write it anew, or leave it out"),
    ("a.json", b'{"text": "x"}\n{"text": 4}', r"a\.json, line 2: data\.text_field=text is a number"),
    ("a.json", b'{"data": [{"text": "x"}]}', r"no row of .*a\.json has data\.text_field=text; its fields are data"),
    ("a.parquet", b"", r"cannot read .*a\.parquet: .*0 bytes; write it anew, or leave it out"),
    ("a.parquet", b"PAR1", r"cannot read .*a\.parquet: .*; write it anew"),
    ("a.csv", b"text\nx", r"a\.csv is a table; write it as \.jsonl or \.parquet, or as \.txt to learn it"),
    ("A.TSV.gz", gzip.compress(b"text\nx"), r"A\.TSV\.gz is a table"),
    ("a.txt", b"ab\xffc", r"a\.txt is not UTF-8 text: byte 0xff at 2; allowed are text files, \.json"),
    ("a.txt", codecs.BOM_UTF16_LE + b"a\0\0\xd8b\0", r"a\.txt is not UTF-16-LE text: byte .* at 4"),
    ("a.txt", "text".encode("utf-16-le"), r"a\.txt is no text: it holds a zero byte at 1, .*; allowed are text files"),
    ("a.jsonl.gz", b"", r"a\.jsonl\.gz is named \.gz, but is empty; write it anew, or name it as what it is"),
    ("a.jsonl.gz", b'{"text": "x"}', r"a\.jsonl\.gz is named \.gz, but begins with b'\{\"te'"),
    ("a.txt.zst", gzip.compress(b"x")[:1] + b"x", r"a\.txt\.zst is named \.zst, but begins with"),
    ("a.gz", gzip.compress(b"x" * 99)[:-9], r"cannot read .*a\.gz: Compressed file ended before"),
    ("a.xz", lzma.compress(b"x" * 99)[:-9], r"cannot read .*a\.xz: Compressed file ended before"),
    ("a.zst", pyarrow.compress(b"x" * 99, codec="zstd", asbytes=True)[:-1], r"cannot read .*a\.zst: Truncated"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"), WRONG, ids=lambda x: x if isinstance(x, str) and len(x) < 12 else ""
)
def test_what_cannot_be_read_is_said_with_file_row_and_what_to_do(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_a_compressed_file_that_is_cut_off_says_behind_which_row(tmp_path):
    data = gzip.compress(json_lines([{"text": str(random.Random(i).random())} for i in range(9000)]).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl\.gz behind line \d{4}: Compressed file ended"):
        read(tmp_path / "a.jsonl.gz")


def _strings(*values):
    """A column of strings whose bytes nobody has checked."""
    return pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())


@pytest.mark.parametrize(
    ("columns", "names", "field", "message"),
    [
        ([_strings(b"x", b"a\xff")], ["text"], "text", r"row 2: .*=text is not UTF-8 text: byte 0xff at 1"),
        ([pyarrow.array(["x"])] * 2, ["text", "text"], "text", r"a\.parquet has 2 columns text; keep one of them"),
        ([pyarrow.array([1])], ["text"], "text", r"data\.text_field=text holds int64, not text; name a column of text"),
        ([pyarrow.array([["x"]])], ["text"], "text", r"data\.text_field=text holds list<.*, not text"),
        ([pyarrow.array([b"x"])], ["text"], "text", r"data\.text_field=text holds binary, not text"),
        ([pyarrow.array(["x"])], ["meta"], "meta.text", r"data\.text_field=meta\.text, but column meta holds string"),
        ([pyarrow.array([{"n": 1, "m": {"k": 2}}])], ["meta"], "meta.text", r"its fields are meta\.n, meta\.m\.k"),
        ([pyarrow.array([{"text": 1}])], ["meta"], "meta.text", r"data\.text_field=meta\.text holds int64"),
        ([pyarrow.array([{"text": "x"}])], ["text"], "text", r"data\.text_field=text holds struct<text: string>"),
    ],
)  # fmt: skip
def test_columns_that_hold_no_text_are_said(tmp_path, columns, names, field, message):
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.parquet", field)


def test_a_field_within_what_is_no_object_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"meta": {"a": 5}}')
    with pytest.raises(
        DataError, match=r"line 1: data\.text_field=meta\.a\.text, but meta\.a is a number, which has no"
    ):
        read(tmp_path / "a.jsonl", "meta.a.text")


NAMES = ["a.txt", "a.jsonl", "a.json", "a.parquet", "a.jsonl.gz", "a.txt.bz2", "a.json.xz", "a.jsonl.zst"]


def _good(name):
    rows = [{"text": f"text {i} é", "meta": {"n": i}} for i in range(20)]
    suffix = Path(name).suffix
    if name.endswith(".parquet"):
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue().to_pybytes()
    return COMPRESS.get(suffix, bytes)((json.dumps(rows) if ".json." in name else json_lines(rows)).encode())


@given(
    name=st.sampled_from(NAMES), seed=st.integers(0, 10**6), cut=st.booleans(), data=st.none() | st.binary(max_size=60)
)
@example(name="a.jsonl", seed=0, cut=False, data=b"\xff\xfe")
def test_damaged_files_give_text_or_an_error_with_their_name(folder, name, seed, cut, data):
    if data is None:
        data, chance = bytearray(_good(name)), random.Random(seed)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        data = data[: chance.randrange(len(data))] if cut else data
    file = folder / f"damaged-{name}"
    file.write_bytes(data)
    texts, said = _outcome(file)
    assert all(texts)
    assert said is None or (said.startswith("data.path: ") and str(file) in said and "\n" not in said)


def _outcome(file):
    try:
        return read(file)[0], None
    except DataError as error:
        return [], str(error)


# Folders

NODES = ["a", "b.txt", ".hidden", "c", "d.txt", ".d"]


@st.composite
def trees(draw):
    """(path, target): folders with target None, files with "", links to what target names, which may be above them."""
    folders, made = [Path()], []
    for _ in range(draw(st.integers(1, 10))):
        inside = draw(st.sampled_from(folders))
        path = inside / draw(st.sampled_from(NODES))
        if any(path == other for other, _ in made):
            continue
        kind = draw(st.sampled_from(["folder", "file", "link"]))
        target = draw(st.sampled_from([*folders, *(other for other, _ in made)])) if kind == "link" else None
        made.append((path, {"folder": None, "file": "", "link": target}[kind]))
        if kind == "folder":
            folders.append(path)
    return made


@given(made=trees())
def test_what_is_reached_without_a_hidden_name_is_read_once_whatever_links_there_are(made):
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary).resolve()
        for path, target in made:
            if target is None:
                (root / path).mkdir()
            elif target == "":
                (root / path).write_text(str(path))
            else:
                (root / path).symlink_to(root / target)
        reached, waiting, entries, hidden = {root}, [root], 1, 0
        while waiting:
            here = waiting.pop()
            for entry in here.iterdir() if here.is_dir() else ():
                if entry.name.startswith("."):
                    hidden += 1
                    continue
                entries += 1
                if entry.resolve() not in reached:
                    reached.add(entry.resolve())
                    waiting.append(entry.resolve())
        expected = sorted(path for path in reached if path.is_file())
        passed_over = PassedOver()
        files = source_files(str(root), passed_over) if expected else []
        assert sorted(file.resolve() for file in files) == expected
        assert files == sorted(files, key=lambda file: file.parts)
        if expected:
            counts = {HIDDEN: hidden, READ_ALREADY: entries - len(reached)}
            assert {k: n for k, (n, _) in passed_over.counts.items()} == {k: n for k, n in counts.items() if n}


def test_pipes_are_passed_over_and_broken_links_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe")
    passed_over = PassedOver()
    assert source_files(str(tmp_path), passed_over) == [tmp_path / "a.txt"]
    assert str(passed_over) == f"passed over: {SPECIAL} (1, the first is {tmp_path / 'pipe'})"
    with pytest.raises(DataError, match="pipe: it is neither a file nor a folder"):
        source_files(str(tmp_path / "pipe"), passed_over)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    with pytest.raises(DataError, match=r"cannot read .*self: Too many levels of symbolic links"):
        source_files(str(tmp_path), PassedOver())


def test_a_hidden_file_or_folder_may_be_named(tmp_path):
    (tmp_path / ".texts").mkdir()
    (tmp_path / ".texts" / "a.txt").write_text("text")
    (tmp_path / ".b.txt").write_text("text")
    for name, expected in ((".texts", ".texts/a.txt"), (".b.txt", ".b.txt")):
        assert source_files(str(tmp_path / name), PassedOver()) == [tmp_path / expected]


def test_a_folder_of_hidden_files_alone_says_so(tmp_path):
    (tmp_path / ".a.txt").write_text("text")
    with pytest.raises(DataError, match=r"no files in it; allowed are text files, .*; passed over: hidden files"):
        source_files(str(tmp_path), PassedOver())


# Building


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json_lines([{"text": "some words"}, {"text": None}, {"text": "more words\n" * 30}]))
    (folder / "b.txt").touch()
    (folder / ".c.txt").write_text("hidden")
    return folder


def _config(texts, **changed):
    config = DataConfig(path=str(texts), tokenizer="bytes", cache_dir=str(texts.parent / "cache"))
    return replace(config, **changed)


def test_what_is_passed_over_is_known_of_a_corpus_also_when_it_comes_from_the_cache(texts):
    said = [str(prepare(_config(texts)).passed_over) for _ in range(2)]
    assert said[0] == (
        f"passed over: hidden files and folders (1, the first is {texts / '.c.txt'}); rows without text (1, the first "
        f"is {texts / 'a.jsonl'}, line 2); empty files (1, the first is {texts / 'b.txt'})"
    )
    assert said[1] == said[0]


def test_no_text_at_all_says_what_was_passed_over(texts):
    (texts / "a.jsonl").write_text('{"text": null}')
    with pytest.raises(DataError, match=r"no text in its 2 files; passed over: .*rows without text \(1"):
        prepare(_config(texts))


@pytest.mark.parametrize("change", ["appended", "replaced", "removed"])
def test_a_file_that_changes_while_it_is_read_is_refused_and_nothing_is_kept(texts, monkeypatch, change):
    def read_while_somebody_writes(file, *arguments):
        yield from read_documents(file, *arguments)
        if file.suffix != ".jsonl":
            return
        if change == "appended":
            with file.open("a") as end:
                end.write('{"text": "new"}\n')
        elif change == "replaced":
            (texts.parent / "new").write_text('{"text": "quite another"}\n')
            (texts.parent / "new").replace(file)
        else:
            file.unlink()

    monkeypatch.setattr(building, "read_documents", read_while_somebody_writes)
    said = (
        r"cannot read .*a\.jsonl: No such file" if change == "removed" else r"a\.jsonl changed while it was read; start"
    )
    with pytest.raises(DataError, match=said):
        prepare(_config(texts))
    monkeypatch.undo()
    assert not list((texts.parent / "cache").glob("*.ref"))


DAMAGED = [
    ("tokenizer.json", b"", r"tokenizer\.json is no readable tokenizer: .*; copy it anew"),
    ("tokenizer.json", b'{"version": "1.0"', r"tokenizer\.json is no readable tokenizer"),
    ("tokenizer_config.json", b"", r"tokenizer_config\.json cannot be read as JSON: .*; copy it anew"),
    ("tokenizer_config.json", b"\xff\xfe{", r"tokenizer_config\.json cannot be read as JSON"),
    ("tokenizer_config.json", b"[" * 100_000, r"tokenizer_config\.json cannot be read as JSON"),
    ("tokenizer_config.json", b"[1]", r"tokenizer_config\.json holds a list, not an object; copy it anew"),
    ("special_tokens_map.json", b"{", r"special_tokens_map\.json cannot be read as JSON: .*; copy it anew"),
]


def _tokenizer(folder, model=None):
    import tokenizers
    from tokenizers import models

    folder.mkdir()
    words = {"some": 0, "words": 1, "more": 2, "\n": 3, "unknown": 4}
    backend = tokenizers.Tokenizer(model or models.WordLevel(words, unk_token="unknown"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED, ids=lambda x: x if isinstance(x, str) else "")
def test_a_damaged_tokenizer_is_said_by_its_file(texts, tmp_path, name, content, message):
    path = _tokenizer(tmp_path / "tokenizer")
    prepare(_config(texts, tokenizer=path))
    (tmp_path / "tokenizer" / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(_config(texts, tokenizer=path))


@pytest.mark.parametrize("named", [5, ["x"], {"content": ["x"]}, {"content": None}, "not there"], ids=str)
def test_a_separator_that_is_no_token_is_taken_behind_the_vocabulary(texts, tmp_path, named):
    path = _tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"bos_token": named}))
    assert prepare(_config(texts, tokenizer=path)).tokenizer.separator == 5


def test_a_tokenizer_without_tokens_for_the_text_is_said_by_its_file(texts, tmp_path):
    from tokenizers import models

    lacking = _tokenizer(tmp_path / "lacking", models.WordLevel({"some": 0}, unk_token="absent"))
    with pytest.raises(
        DataError, match=r"lacking/tokenizer\.json has no tokens for this text: .*; take a tokenizer that"
    ):
        prepare(_config(texts, tokenizer=lacking))
    empty = _tokenizer(tmp_path / "empty", models.BPE({}, []))
    with pytest.raises(DataError, match=r"empty/tokenizer\.json has no tokens; copy it anew"):
        prepare(_config(texts, tokenizer=empty))
