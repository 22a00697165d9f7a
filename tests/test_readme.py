"""The README's Python runs as it stands."""

import re
from pathlib import Path

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_python_blocks_run_in_order(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) >= 2
    scope = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert "evaluations of the vector field" in capsys.readouterr().out
    assert scope["solution"].x.shape == scope["x"].shape


def test_ten_lines():
    block = re.search(r"```python\n(.*?)```", README, flags=re.S).group(1)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10


def test_the_two_commands_exist():
    makefile = (Path(__file__).resolve().parents[1] / "Makefile").read_text()
    assert "make demo" in README and "make test" in README
    assert "\ndemo:" in makefile and "\ntest:" in makefile
