"""judge/ledger.py: what is written can be read back, and nothing else can."""

import io
import random

import pandas
import pytest

from judge import ledger

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
    text = ""
    for row in rows:
        text = ledger.appended(text, row)
    return text


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


@pytest.mark.parametrize("bad", [{"number": 2}, {"status": "BEST"}, {"commit": "HEAD"}, {"score": float("nan")}])
def test_row_that_cannot_be_read_back_is_not_appended(bad):
    with pytest.raises(ledger.LedgerError):
        ledger.appended("", make_row(**bad))


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
    ledger.write(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_lineage_and_kept_rows():
    rows = [
        make_row(1),
        make_row(2, status="REGRESSION"),
        make_row(3, lineage=2, chip="v6e"),
        make_row(4),
        make_row(5, lineage=3, mode="chip"),
    ]
    assert ledger.lineage_of(rows, "v5e", "model") == 1
    assert ledger.lineage_of(rows, "v5e", "chip") == 3
    assert ledger.lineage_of(rows, "v5p", "model") is None
    assert [row.number for row in ledger.kept(rows, 1)] == [1, 4]
    assert ledger.kept(rows, None) == []
