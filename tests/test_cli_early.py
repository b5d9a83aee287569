"""What is wrong with a command line is said before the work, by every command."""

import pytest
from helpers import run_command

WRONG = {
    "a length past every prompt": ("bench kernels --lengths 1000000M", 2, "more than 16,777,216 tokens"),
    "as many new tokens": ("generate DIR hi --max-new-tokens 1000000000000", 2, "max-new-tokens"),
    "a picture in a folder that is not there": ("bench kernels --plot DIR/no/x.png", 2, "no is no directory"),
    "a picture of an unknown kind": ("inspect --patterns DIR/text --plot DIR/x.xyz", 2, "pictures end in .png"),
    "a field that no pattern has": ("bench operator --pattern a-shape:zz=1", 2, "no field=value of a-shape"),
    "heads that are none": ("bench operator --pattern dense --heads 3", 2, "no head layout"),
    "rows that are a text": ("bench prefill --rows DIR/text", 1, "text is not what --json printed"),
    "a job's file that something else made": ("batch DIR/rows.jsonl --prompt {a} --out DIR/text", 2, "text.run.json"),
    "the same of a summary": ("summarize DIR/rows.jsonl --keywords a --out DIR/text", 2, "text.run.json"),
    "a row that has a field twice": ("batch DIR/twice.jsonl --prompt {a} --out DIR/x", 1, "'a' occurs twice"),
    "a row with a number that JSON has not": ("batch DIR/nan.jsonl --prompt {a} --out DIR/x", 1, "NaN is not a number"),
    "more rows at once than there are": ("batch DIR/rows.jsonl --prompt {a} --out DIR/x --batch 10000000", 2, "batch"),
    "reviews without end": ("make-reviews DIR/x.jsonl --count 100000000000000", 2, "count"),
    "a checkpoint's folder that holds something": ("convert DIR/nothing DIR", 1, "exists and is not empty"),
    "a checkpoint's folder below a file": ("convert DIR/nothing DIR/text/x", 2, "text is a file"),
    "a checkpoint's dtype": ("convert DIR/nothing DIR/x --dtype int4", 2, "dtype must be one of"),
    "an empty text": ("generate DIR --file DIR/empty", 1, "empty is empty"),
    "a text in another encoding": ("compare --model DIR --text DIR/latin", 1, "latin is not UTF-8 text"),
}


@pytest.mark.parametrize("command, status, message", WRONG.values(), ids=WRONG)
def test_a_wrong_command_line_ends_at_once(capsys, tmp_path, command, status, message):
    files = {"text": b"hello", "empty": b" \n", "latin": b"caf\xe9", "rows.jsonl": b'{"a": 1}\n'}
    for name, content in (files | {"twice.jsonl": b'{"a": 1, "a": 2}', "nan.jsonl": b'{"a": NaN}'}).items():
        (tmp_path / name).write_bytes(content)
    found, _, error = run_command(capsys, *(word.replace("DIR", str(tmp_path)) for word in command.split()))
    assert found == status and message in error
