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
    # Columns that JSON has nothing for are left out.
    other = {
        "day": pa.date32(), "date": pa.date64(), "time": pa.time64("us"), "created_at": pa.timestamp("us", "UTC"),
        "took": pa.duration("s"), "every": pa.month_day_nano_interval(), "price": pa.decimal128(9, 2), "bytes": pa.binary(),
        "large": pa.large_binary(), "view": pa.binary_view(), "hash": pa.binary(4), "vector": pa.list_(pa.float32(), 3),
        "map": pa.map_(pa.string(), pa.int32()), "days": pa.list_(pa.date32()),
    }
    columns = {name: pa.nulls(6, kind) for name, kind in other.items()}
    columns["day"] = pa.array(range(6), pa.int32()).cast(pa.date32())
    columns["created_at"] = pa.array(range(6), pa.int64()).cast(other["created_at"])
    columns["vector"] = pa.array([[1, 2, 3]] * 6, other["vector"])
    columns["map"] = pa.array([[("a", 1)]] * 6, other["map"])
    columns["bytes"] = pa.array([b"abc"] * 6)
    nested = pa.StructArray.from_arrays([plain["text"].combine_chunks(), columns["day"]], ["text", "day"])
    all_of_them = pa.table({"text": plain["text"], "meta": nested, **columns})
    batches("other.arrow", pa.ipc.new_stream, all_of_them)
    # Of a type that is not read.
    number = pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), pa.array([7]))
    batches("number.arrow", pa.ipc.new_stream, pa.table({"text": ["a"], "number": number}))


if __name__ == "__main__":
    main()
