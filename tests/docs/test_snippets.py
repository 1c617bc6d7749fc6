"""The documents' Python runs, prints what they say, and is the same in both languages."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamina.interop.peft import uninstall
from tests.docs.snippets import run, same_output, skeleton, snippets

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    document
    for document in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    if snippets(document)
)
GUIDE = ROOT / "docs" / "multi-stage.md"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_snippets_run_and_print_what_the_document_says(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        printed = run(document)
    finally:
        # Where a document puts Lamina in the place of peft and fails before it takes it away.
        uninstall()
    wrong = [
        f"{document.name}:{snippet.line} prints\n{output}\nand not\n{snippet.output}"
        for snippet, output in zip(snippets(document), printed, strict=True)
        if not same_output(snippet.output, output)
    ]
    assert not wrong, "\n\n".join(wrong)


def test_the_guide_and_the_readme_have_snippets() -> None:
    assert {GUIDE, ROOT / "README.md"} <= set(DOCUMENTS)


def test_the_chinese_guide_has_the_same_code() -> None:
    english, chinese = snippets(GUIDE), snippets(GUIDE.with_suffix(".zh.md"))
    assert len(english) == len(chinese)
    for ours, theirs in zip(english, chinese, strict=True):
        assert skeleton(ours.code) == skeleton(theirs.code), f"multi-stage.zh.md:{theirs.line}"


def test_output_may_differ_in_fractions_only() -> None:
    assert same_output("loss 5.20 -> 0.71\n", "loss 5.31 -> 0.69\n\n")
    assert not same_output("loss 5.20", "loss 9.20")
    assert not same_output("16 tensors", "17 tensors")
    assert not same_output("", "something")
