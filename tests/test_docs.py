"""The documentation: every link of every Markdown file leads somewhere, every public name explains itself."""

import inspect
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import moka

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
MARKDOWN = MarkdownIt("commonmark").enable("table")


def links(text: str) -> list[str]:
    """Targets of all links and images."""
    inline = [child for token in MARKDOWN.parse(text) for child in token.children or []]
    targets = [token.attrGet("href") or token.attrGet("src") for token in inline]
    return [str(target) for target in targets if target]


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to headings."""
    tokens = MARKDOWN.parse(text)
    headings = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open"]
    found: set[str] = set()
    for heading in headings:
        content = "".join(child.content for child in heading.children or [])
        name = re.sub(r"[^\w\- ]", "", content.lower()).replace(" ", "-")
        repeats = sum(1 for other in found if re.fullmatch(rf"{re.escape(name)}(-\d+)?", other))
        found.add(f"{name}-{repeats}" if repeats else name)
    return found


def broken(page: Path, text: str) -> list[str]:
    """The relative links of a page that lead to no file or no heading."""
    missing = []
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path
        if not target.exists() or (
            anchor and anchor not in anchors(target.read_text("utf-8") if path else text)
        ):
            missing.append(link)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert not broken(page, page.read_text("utf-8"))


def test_broken_links_are_found():
    """The check itself, on links of each kind."""
    good = "# A *b*, `c`\n# A b c\n[x](README.md) [y](#a-b-c-1) [z](README.md#limits) [w](https://no.where)"
    bad = "\n[a](none.md) [b](#none) [c](README.md#none) ![d](none.png)\n\n| [e](none-e.md) |\n| --- |\n"
    assert broken(ROOT / "page.md", good) == []
    expected = ["none.md", "#none", "README.md#none", "none.png", "none-e.md"]
    assert broken(ROOT / "page.md", good + bad) == expected


def test_every_page_is_listed():
    index = ROOT / "docs" / "index.md"
    listed = {(index.parent / link).resolve() for link in links(index.read_text("utf-8"))}
    assert set((ROOT / "docs").glob("*.md")) - listed == {index}


@pytest.mark.parametrize("name", moka.__all__)
def test_public_names_explain_themselves(name):
    """A docstring; for functions that take more than a model, each argument by name and an example."""
    public = getattr(moka, name)
    text = inspect.getdoc(public)
    assert text and len(text.splitlines()[0]) > 20
    if inspect.isfunction(public) and len(arguments := inspect.signature(public).parameters) > 2:
        _, _, described = text.partition("Args:")
        missing = [a for a in arguments if not re.search(rf"^ +[\w, ]*\b{a}\b[\w, ]*:", described, re.M)]
        assert not missing
        assert "Example:" in text or ">>>" in text
