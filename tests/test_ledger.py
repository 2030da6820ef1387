"""judge/ledger.py: what is written can be read back, and nothing else can."""

import io
import math
import os
import random
from pathlib import Path

import pandas
import pytest
from conftest import ROOT, appended

from judge import ledger
from judge.ledger_index import LedgerIndex

NOTES = [
    "plain",
    "",
    "\ttabs\tand\nnewlines\r\n",
    'quotes " and \' and ""',
    "back\\slash \\t \\n \\\\ \\x00",
    "".join(map(chr, range(32))) + "\x7f\x80\x9f",
    "emoji 🚀, ideographs 漢字, accents é",
    "\ufeffmark \u2028 separator \u202e flipped \u200b hidden",
    "\udcff\ud800 lone surrogates",
    "=1+1, #comment, NA, nan, null",
]


def make_row(number: int = 1, **changes) -> ledger.Row:
    values = dict.fromkeys(ledger.COLUMNS[:-1]) | {
        "commit": f"{number:040x}",
        "status": "PASS",
        "score": 7142.8899999,
        "note": "a note",
        "number": number,
        "lineage": 1,
        "chip": "v5e",
        "mode": "model",
        "regime": "MEMORY-BOUND",
        "workloads": "",
        "parent_commit": "",
        "artifact_sha256": "",
        "judge_sha256": "",
        "reason": "",
    }
    return ledger.Row(**values | changes)


def ledger_of(*rows: ledger.Row) -> str:
    return appended("", *rows)


@pytest.mark.parametrize("note", NOTES)
def test_note_round_trip(note):
    text = ledger_of(make_row(1, note=note, reason=note), make_row(2, note="next"))
    assert text.isprintable() or {c for c in text if not c.isprintable()} <= {"\t", "\n"}
    assert len(text.split("\n")) == 4
    text.encode()  # no surrogate is left
    first, second = ledger.parse(text)
    assert (first.note, first.reason, second.note) == (note, note, "next")


def test_random_notes_round_trip():
    draw = random.Random(5)
    alphabet = "ab\\tn\t\n\r\"'x0u\x00\x1b\u2028🚀\ud800 "
    for _ in range(500):
        note = "".join(draw.choices(alphabet, k=draw.randrange(12)))
        assert ledger.unescape(ledger.escape(note)) == note


def test_pandas_reads_it():
    rows = [make_row(number, note=note) for number, note in enumerate(NOTES, 1)]
    table = pandas.read_csv(io.StringIO(ledger_of(*rows)), sep="\t", keep_default_na=False)
    assert table.shape == (len(NOTES), len(ledger.COLUMNS))
    assert [ledger.unescape(note.replace('\\"', '"')) for note in table.note] == NOTES


def test_first_nine_columns():
    first = "commit\tscore\tstatus\tmedian_ms\tutil_pct\ttflops\tregime\tbw_util_pct\tnote\t"
    assert ledger.HEADER.startswith(first)


def test_empty_cell_is_no_figure():
    text = ledger_of(make_row(score=None, status="FAIL_CRASH"))
    assert text.splitlines()[1].split("\t")[1] == ""
    assert ledger.parse(text)[0].score is None


@pytest.mark.parametrize("score", [0.1, 1 / 3, 1e-12, 123456789.123, 2.5e300])
def test_float_is_stable_once_written(score):
    text = ledger_of(make_row(score=score))
    read = ledger.parse(text)[0]
    assert read.score == pytest.approx(score, rel=1e-8)
    assert ledger.format_row(read, ledger.GENESIS) == text.splitlines(keepends=True)[1]


def test_workload_times():
    row = make_row(workloads="decode:0.5:1:2:3;prefill-8k:12.25:1:2:3")
    assert row.workload_ms == {"decode": 0.5, "prefill-8k": 12.25}


@pytest.mark.parametrize("bad", [{"status": "BEST"}, {"commit": "HEAD"}, {"score": float("nan")}])
def test_row_that_cannot_be_read_back_is_not_appended(bad):
    with pytest.raises(ledger.LedgerError):
        ledger.next_line(make_row(**bad), ledger.GENESIS)


def test_every_changed_character_is_found():
    text = ledger_of(make_row(1), make_row(2, score=3.25, note="second"), make_row(3))
    draw = random.Random(7)
    for position in draw.sample(range(len(text)), 300):
        changed = text[:position] + chr(ord(text[position]) ^ 1) + text[position + 1 :]
        line = text[:position].count("\n") + 1
        with pytest.raises(ledger.LedgerError) as caught:
            ledger.parse(changed)
        # A changed hash shows on its own line or on the next; a line break that is gone, on the line it ended.
        assert caught.value.args[0].startswith((f"results.tsv:{line}: ", f"results.tsv:{line + 1}: "))


def test_missing_and_swapped_rows_are_found():
    lines = ledger_of(*(make_row(number) for number in (1, 2, 3))).splitlines(keepends=True)
    for order, line in (([0, 2, 3], 2), ([0, 1, 3], 3), ([0, 2, 1, 3], 2), ([0, 1, 1, 2, 3], 3), ([0, 1, 2, 3, 3], 5)):
        with pytest.raises(ledger.LedgerError, match=rf"^results.tsv:{line}: "):
            ledger.parse("".join(lines[i] for i in order))


def test_file_that_is_not_text(tmp_path):
    path = tmp_path / "results.tsv"
    assert ledger.read(path) == []
    path.write_bytes(ledger.HEADER.encode() + b"\n\xff\n")
    with pytest.raises(ledger.LedgerError, match=r"^results.tsv:2: not UTF-8"):
        ledger.read(path)


def test_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "results.tsv"
    path.write_text("old and longer than the new text")
    path.chmod(0o640)
    ledger.write_durably(path, b"new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_kept_rows():
    rows = [make_row(1), make_row(2, status="REGRESSION"), make_row(3, lineage=2, chip="v6e"), make_row(4)]
    assert [row.number for row in ledger.kept(rows, 1)] == [1, 4]
    assert ledger.kept(rows, None) == []


def test_append_and_torn_tail(tmp_path):
    path = tmp_path / "results.tsv"
    rows = [make_row(1, note="long " * 40_000), make_row(2)]
    lines = ledger_of(*rows).splitlines(keepends=True)
    for number, line in enumerate(lines[1:], 1):
        offset = ledger.append(path, line)
        assert path.read_text() == "".join(lines[: number + 1])
        assert path.read_bytes()[offset:] == line.encode()
        assert ledger.torn_tail(path) == b""
    for length in (1, 100, 70_000, 150_000):
        path.write_bytes((lines[0] + lines[1][:length]).encode())
        assert ledger.torn_tail(path) == lines[1][:length].encode()


# --- the DataFrame ---


def test_frame_is_typed(tmp_path):
    path = tmp_path / "results.tsv"
    rows = [make_row(number, note=note, reason=note) for number, note in enumerate(NOTES, 1)]
    rows.append(make_row(len(rows) + 1, score=None, status="FAIL_CRASH", spill_count=7))
    path.write_text(ledger_of(*rows))
    table = ledger.frame(path)
    assert list(table.columns) == list(ledger.COLUMNS)
    assert table.note.tolist() == [*NOTES, "a note"]
    assert table.reason.tolist() == [*NOTES, ""]
    assert str(table.score.dtype) == "float64"
    assert table.score.isna().tolist() == [row.score is None for row in rows]
    assert [str(table[name].dtype) for name in ("number", "lineage", "spill_count", "status")] == [
        *("int64", "int64", "Int64", "category"),
    ]
    assert table.spill_count.iloc[-1] == 7
    assert table.number.tolist() == list(range(1, len(rows) + 1))


def test_frame_of_the_recorded_ledger():
    table = ledger.frame(ROOT / "results.tsv")
    rows = ledger.read(ROOT / "results.tsv")
    assert len(table) == len(rows) >= 17
    for row, (_, cells) in zip(rows, table.iterrows(), strict=True):
        assert (row.commit, row.status, row.note, row.number) == (cells.commit, cells.status, cells.note, cells.number)
        assert cells.score == row.score or (row.score is None and math.isnan(cells.score))


def test_frame_of_what_is_no_ledger(tmp_path):
    path = tmp_path / "results.tsv"
    assert len(ledger.frame(path)) == 0
    path.write_text(ledger_of(make_row(1)) + "torn")
    assert len(ledger.frame(path)) == 1
    path.write_text("something else\n")
    with pytest.raises(ledger.LedgerError, match=r"^results.tsv:1: not the header"):
        ledger.frame(path)


# --- the index ---


ROWS = [
    make_row(1, artifact_sha256="a" * 64),
    make_row(2, status="REGRESSION", artifact_sha256="b" * 64),
    make_row(3, lineage=2, chip="v6e"),
    make_row(4, note="\u00e9\U0001f680"),
    make_row(5, lineage=3, mode="chip", status="FAIL_CRASH"),
    make_row(6, lineage=4, status="FAIL_CONTRACT"),  # a baseline that failed is no lineage to go on with
    make_row(7, status="DUPLICATE", artifact_sha256="b" * 64),
]


@pytest.fixture
def indexed(tmp_path):
    path = tmp_path / "results.tsv"
    path.write_text(ledger_of(*ROWS))
    index = LedgerIndex(path, tmp_path / "cache", "blob")
    assert not index.is_current
    index.rebuild()
    return index


def assert_lookups(index):
    assert (index.count, index.last_lineage, index.newest_based_lineage) == (7, 4, 2)
    assert [index.row(number).note for number in range(1, 8)] == [row.note for row in ROWS]
    assert index.newest_lineage("v5e", "model") == 1
    assert index.newest_lineage("v5e", "chip") == 3
    assert index.newest_lineage("v5p", "model") is None
    assert (index.baseline(1).number, index.champion(1).number) == (1, 4)
    assert (index.baseline(3), index.champion(3), index.champion(None)) == (None, None, None)
    assert [row.number for row in index.with_program(1, "b" * 64)] == [7, 2]
    assert list(index.with_program(2, "b" * 64)) == []
    assert list(index.with_program(1, "b" * 63 + "c")) == []


def test_index_lookups(indexed, tmp_path):
    assert_lookups(indexed)
    again = LedgerIndex(indexed.path, tmp_path / "cache", "blob")
    assert again.is_current
    assert_lookups(again)


def test_index_takes_in_an_appended_row(indexed, tmp_path):
    line = ledger.next_line(make_row(8, lineage=1), indexed.last_sha256)
    offset = ledger.append(indexed.path, line)
    indexed.add(ledger.parse_row(line[:-1], "new"), offset, "next blob")
    again = LedgerIndex(indexed.path, tmp_path / "cache", "next blob")
    assert again.is_current
    assert again.champion(1).number == again.count == 8
    assert ledger.read(indexed.path)[-1].row_sha256 == again.last_sha256


def damaged(cache: Path) -> None:
    cache.write_bytes(b"not a database" * 100)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path, cache: path.write_bytes(path.read_bytes()),  # the same content, but who knows
        lambda path, cache: os.utime(path, ns=(1, 1)),
        lambda path, cache: path.unlink(),
        lambda path, cache: damaged(cache),
        lambda path, cache: cache.unlink(),
    ],
)
def test_index_that_is_not_the_ledgers_is_not_used(indexed, tmp_path, spoil):
    text = indexed.path.read_text()
    indexed.close()
    spoil(indexed.path, tmp_path / "cache")
    index = LedgerIndex(indexed.path, tmp_path / "cache", "blob")
    assert not index.is_current
    indexed.path.write_text(text)
    index.rebuild()
    assert_lookups(index)


def test_index_of_another_blob_is_not_used(indexed, tmp_path):
    assert not LedgerIndex(indexed.path, tmp_path / "cache", "another").is_current


def test_index_without_a_place(tmp_path):
    path = tmp_path / "results.tsv"
    path.write_text(ledger_of(*ROWS))
    index = LedgerIndex(path, tmp_path / "none" / "cache", "blob")
    index.rebuild()
    assert_lookups(index)
