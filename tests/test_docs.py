"""The documentation is true: its snippets run, its examples give what they show, it names all."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import tfspark

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/guide.md"]

FENCE = re.compile(r"```(\w*)")
SKIP = re.compile(r"<!-- skip: .+ -->")
LINK = re.compile(r"\]\(([^)#:]+)(?:#([^)]+))?\)")


def script_of(page: str) -> str:
    """The Python blocks of a page on the lines that they have there, so that tracebacks fit.

    A block after `<!-- skip: reason -->` is left out.
    """
    lines, language, skipped = [], None, False
    for line in page.splitlines():
        fence = FENCE.match(line)
        if fence is None:
            lines.append(line if language == "python" and not skipped else "")
            if language is None and line.strip():
                skipped = SKIP.fullmatch(line) is not None
            continue
        lines.append("")
        if language is None:
            language = fence[1]
        else:
            language, skipped = None, False
    return "\n".join(lines) + "\n"


def test_blocks_keep_their_lines_and_skipped_ones_are_left_out():
    page = (
        "text\n```python\na = 1\n```\n<!-- skip: needs a cluster -->\n```python\nb = 2\n```\n"
        "```sh\nls\n```\n```python\nc = 3\n```\n"
    )
    assert script_of(page).splitlines() == [*[""] * 2, "a = 1", *[""] * 9, "c = 3", ""]


@pytest.fixture
def run_script(run_python, tmp_path):
    """Runs a file as a script, in an empty folder."""

    def run(script: Path) -> str:
        return run_python(f"""
            import os, runpy
            os.chdir({str(tmp_path)!r})
            runpy.run_path({str(script)!r}, run_name="__main__")
        """).stdout

    return run


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_of_a_page_run_in_their_order(page, run_script, tmp_path):
    source = script_of((ROOT / page).read_text(encoding="utf-8"))
    assert "import" in source
    # A file, because AutoGraph and tracebacks read source code from there.
    script = tmp_path / Path(page).with_suffix(".py").name
    script.write_text(source, encoding="utf-8")
    run_script(script)


@pytest.mark.cluster
@pytest.mark.slow
def test_the_examples_of_docstrings_are_right(run_script):
    number, what = run_script(ROOT / "tests" / "support" / "docstrings.py").split()[-2:]
    assert what == "examples" and int(number) > 50


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        *(
            f"docs/{name}.md"
            for name in ("guide", "migration", "large_batches", "speed", "scaling")
        ),
    ],
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target, anchor in LINK.findall(path.read_text(encoding="utf-8")):
        linked = (path.parent / target).resolve()
        assert linked.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8"))


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", page)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


class TestApiReference:
    @pytest.fixture
    def generator(self):
        path = ROOT / "tools" / "api_reference.py"
        spec = importlib.util.spec_from_file_location("api_reference", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def test_it_names_everything_public(self, generator):
        names = {name for section in generator.documented().values() for _, name in section}
        assert {*tfspark.__all__} - {"errors"} <= names
        assert {"TFSparkError", "DataError", "NonFiniteError"} <= names

    def test_it_is_what_the_docstrings_say(self, generator):
        written = generator.PAGE.read_text(encoding="utf-8")
        assert written == generator.page(), (
            "docs/api.md is stale: run python tools/api_reference.py"
        )


def test_the_changelog_names_everything_public():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{tfspark.__version__}]" in text
    names = set(re.findall(r"`(?:[\w.]+\.)?(\w+)`", text))
    assert not set(tfspark.__all__) - names - {"errors"}
