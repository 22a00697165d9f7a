"""The documents: their code runs, their paths and links lead somewhere, their words are the code's.

Code that pages quote from elsewhere (LLVM IR) is compared with what their own code prints.
"""

import io
import re
import subprocess
import tokenize
from pathlib import Path
from urllib.parse import unquote

import pytest

import grand_fast as gf

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    p.relative_to(ROOT)
    for p in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "bench/README.md",
        ROOT / "kernels/README.md",
    )
)
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=str)
TOP = {p.name for p in ROOT.iterdir()}
NAMED = re.compile(r"[\w.+-]+\.(?:py|md|toml)")
PLACEHOLDERS = re.compile(r"[<>*…=:$]|\bNAME\b|\bFILE\b|\bDATA\b")


def text_of(page):
    return (ROOT / page).read_text()


def python_blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)


def run(page):
    scope = {}
    for block in python_blocks(text_of(page)):
        exec(compile(block, str(page), "exec"), scope)
    return scope


WITH_CODE = [p for p in PAGES if python_blocks(text_of(p)) and str(p) != "README.md"]


@pytest.mark.parametrize("page", WITH_CODE, ids=str)
def test_python_on_a_page_runs_and_prints_what_is_quoted(page, capsys):
    run(page)
    printed = capsys.readouterr().out
    for quoted in re.findall(r"^```llvm\n(.*?)^```", text_of(page), re.S | re.M):
        assert re.search(pattern_of(quoted), printed, re.S), quoted


def pattern_of(quoted):
    """Lines as they stand, `…` for any number of characters or whole lines."""
    lines = [line.strip() for line in quoted.strip().splitlines()]
    return r"\n\s*".join(re.escape(line).replace("…", ".*?") for line in lines)


def test_the_pages_with_code_are_found():
    assert {"CONTRIBUTING.md", "docs/kernel-language.md"} <= set(map(str, WITH_CODE))


def test_the_command_of_a_page_runs_its_code():
    page = "docs/kernel-language.md"
    command = re.search(r"^(sed .*) \| ", text_of(page), re.M)[1]
    found = subprocess.run(
        command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == "".join(python_blocks(text_of(page)))


FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.S | re.M)


def paths_on(page):
    """Words in code that name a file or folder of the repository, from its root or the page's."""
    text = text_of(page)
    code = [block for language, block in FENCED.findall(text) if language != "python"]
    code += re.findall(r"`([^`]+)`", FENCED.sub("", text))
    first = TOP | {p.name for p in (ROOT / page).parent.iterdir()}
    for word in " ".join(code).split():
        word = word.strip("(),;\"'").removesuffix(".")
        if PLACEHOLDERS.search(word):
            continue
        if ("/" in word and word.split("/")[0] in first) or NAMED.fullmatch(Path(word).name):
            yield word


@EVERY_PAGE
def test_paths_on_a_page_exist(page):
    folders = ("kernels", "grand_fast", "bench", "tests", "docs")
    names = TOP | {p.name for folder in folders for p in (ROOT / folder).rglob("*")}
    missing = [
        path
        for path in paths_on(page)
        if not (ROOT / path).exists()
        and not (ROOT / page).parent.joinpath(path).exists()
        and ("/" in path or path not in names)
    ]
    assert not missing


def test_recipes_name_tables_that_are_there():
    """The names in capitals behind a path in a step of a recipe, or before `of` a path."""
    recipes = text_of("CONTRIBUTING.md").split("## Recipes\n")[1].split("\n## ")[0]
    found = re.findall(r"`([A-Z_]{5,})` (?:in|of)\s+`([\w/]+\.py)`", recipes)
    for step in re.split(r"^(?:\d\.|#+) ", FENCED.sub("", recipes), flags=re.M):
        path = None
        for word in re.findall(r"`([^`]+)`", step):
            if "/" in word:
                path = word if (ROOT / word).is_file() else None
            elif path and re.fullmatch(r"[A-Z_]{5,}", word):
                found.append((word, path))
    assert {"SCORES", "METHODS", "ORDERS", "SUITES"} <= {name for name, _ in found}
    missing = [
        (name, path)
        for name, path in found
        if not re.search(rf"^{name}\b", (ROOT / path).read_text(), re.M)
    ]
    assert not missing


@EVERY_PAGE
def test_links_of_a_page_resolve(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = folder / unquote(path) if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors_of(file.read_text()), target


def anchors_of(text):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_every_page_of_docs_is_on_the_front_page():
    front = text_of("README.md")
    for page in (ROOT / "docs").rglob("*.md"):
        assert f"]({page.relative_to(ROOT)})" in front, page


def test_the_words_of_the_glossary_are_in_the_code():
    glossary = text_of("CONTRIBUTING.md").split("## Glossary\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", glossary, re.M)
    words = [w for row in rows for w in re.findall(r"`(\w+)`", row)]
    assert len(words) > 30
    assert not {w.lower().rstrip("s") for w in words} - words_of_names()


def words_of_names():
    """The words of all names in the code, modules included, without an s at their end."""
    names = set()
    for folder in ("kernels", "grand_fast", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            names |= set(path.with_suffix("").relative_to(ROOT).parts)
            tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
            names |= {token.string for token in tokens if token.type == tokenize.NAME}
    parts = {w for name in names for w in re.findall(r"[A-Z]?[a-z]+", name)}
    return {w.lower().rstrip("s") for w in parts}


def test_the_changelog_has_the_version():
    assert f"## [{gf.__version__}]" in text_of("CHANGELOG.md")
