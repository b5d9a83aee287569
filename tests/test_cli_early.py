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
    "an empty text": ("generate DIR --file DIR/empty", 1, "empty is empty"),
    "a text in another encoding": ("compare --model DIR --text DIR/latin", 1, "latin is not UTF-8 text"),
}


@pytest.mark.parametrize("command, status, message", WRONG.values(), ids=WRONG)
def test_a_wrong_command_line_ends_at_once(capsys, tmp_path, command, status, message):
    for name, content in (("text", b"hello"), ("empty", b" \n"), ("latin", b"caf\xe9")):
        (tmp_path / name).write_bytes(content)
    found, _, error = run_command(capsys, *(word.replace("DIR", str(tmp_path)) for word in command.split()))
    assert found == status and message in error
