# /// script
# requires-python = ">=3.10"
# dependencies = ["pyarrow==26.0.1"]
# ///
"""Remakes the files beside it: the rows of rows.jsonl as pyarrow writes them, in every form that is read.

    uv run tests/golden/records/make.py
"""
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet

HERE = Path(__file__).parent


def say(role, content):
    return {"role": role, "content": content}


# Half of the texts are long enough that they pack.
TEXTS = ["A zebra", "", "of many stripes, " * 16, None, "世界", "and of many stripes, " * 16]
ROWS = [
    {
        "text": text,
        "messages": [say("user", f"Question {i}"), say("assistant", "Answer")][: i % 3],
        "source": ["web", "book", None][i % 3],
        "count": None if i == 4 else i - 2,
        "large": 2**63 + i,
        "score": i / 4,
        "kept": i % 2 == 0,
        "nothing": None,
        "tools": [],
        "meta": None if i == 1 else {"id": i, "tags": [[f"t{i}"], []]},
    }
    for i, text in enumerate(TEXTS)
]


def fields(text, list_):
    message = pa.struct([("role", text), ("content", text)])
    return {
        "text": text,
        "messages": list_(message),
        "source": text,
        "count": pa.int16(),
        "large": pa.uint64(),
        "score": pa.float32(),
        "kept": pa.bool_(),
        "nothing": pa.null(),
        "tools": list_(pa.null()),
        "meta": pa.struct([("id", pa.int64()), ("tags", list_(list_(text)))]),
    }


def table(text=pa.string(), list_=pa.list_, **other):
    schema = pa.schema(list((fields(text, list_) | other).items()))
    return pa.Table.from_pylist(ROWS, schema)


def batches(name, new, table, **options):
    """Of four rows, then of two."""
    with new(str(HERE / name), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=4)


def main():
    (HERE / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    plain = table()
    word = pa.dictionary(pa.int8(), pa.string())
    batches("stream.arrow", pa.ipc.new_stream, plain)
    batches("file.arrow", pa.ipc.new_file, table(source=word))
    batches("large.arrow", pa.ipc.new_stream, table(pa.large_string(), pa.large_list))
    batches("views.arrow", pa.ipc.new_stream, table(pa.string_view()))
    for codec in ["lz4", "zstd"]:
        pyarrow.feather.write_feather(plain, str(HERE / f"{codec}.feather"), compression=codec)
    # Each batch adds its word to the dictionary of those before.
    schema = pa.schema([("source", word)])
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    with pa.ipc.new_stream(str(HERE / "deltas.arrow"), schema, options=options) as writer:
        for i in range(len(ROWS)):
            known = plain.slice(0, i + 1)["source"].combine_chunks().dictionary_encode().cast(word)
            writer.write_batch(pa.record_batch([known.slice(i)], schema))
    few = plain.select(["text", "messages"])
    for codec in ["snappy", "gzip", "zstd", "lz4", "brotli"]:
        pyarrow.parquet.write_table(few, HERE / f"{codec}.parquet", compression=codec)
    # Of a type that is not read.
    day = pa.schema([("text", pa.string()), ("meta", pa.struct([("day", pa.date32())]))])
    batches("day.arrow", pa.ipc.new_stream, pa.Table.from_pylist([{"text": "a", "meta": {"day": 1}}], day))


if __name__ == "__main__":
    main()
