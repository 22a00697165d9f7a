"""The front page: short, with the map first, and its Python runs as it stands."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


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
    makefile = (ROOT / "Makefile").read_text()
    assert "make demo" in README and "make test" in README
    assert "\ndemo:" in makefile and "\ntest:" in makefile


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_the_map_is_on_the_first_screen():
    screen = "\n".join(README.splitlines()[:40])
    inner = ("graph", "ops", "solvers", "nn", "terms", "compat", "data", "training")
    folders = ["kernels", "bench", "tests", "docs", *(f"grand_fast/{name}" for name in inner)]
    for folder in folders:
        assert f"`{folder}/`" in screen and (ROOT / folder).is_dir(), folder


def test_each_figure_has_its_command():
    table = README.split("## Figures\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!\|)(.*) \|$", table, re.M)
    figures = [row for row in rows if re.search(r"\d (ms|s|MB)", row)]
    assert figures
    assert all(re.search(r"`python -m bench .*`$|the same$", row) for row in figures)
