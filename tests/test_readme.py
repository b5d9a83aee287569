"""The README's example does what it says, as a script of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

from smollm2 import smollm2_directory

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_example_answers_the_question(tmp_path):
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    example = next(text for text in examples if "Llama.from_pretrained" in text)
    folder = re.search(r'fetch_demo_model\("(.+?)"\)', example)
    assert folder is not None
    # The model is there already, so that this test downloads nothing.
    link = tmp_path / folder[1]
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(smollm2_directory())
    command = [sys.executable, "-W", "error", "-c", example]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
