"""Every command and every Python block of the documentation does what its page says."""

import json
import os
import re
from itertools import zip_longest

import pytest

from sdmodule.cli.unknown_words import KNOWN
from tests.docs.blocks import PAGES, ROOT, Block, commands, find_blocks, run_block

pytestmark = pytest.mark.docs

REMARKS = re.compile(r"|fails|not run: [\w'/ ]+|table: \S+")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(page, workplace):
    names = {"__name__": "__main__"}
    problems = []
    blocks = find_blocks(page)
    for block, following in zip_longest(blocks, blocks[1:]):
        try:
            assert REMARKS.fullmatch(block.remark), f"unknown remark {block.remark!r}"
            if block.language != "text":
                printed = run_block(block, workplace, names)
                if block.remark == "fails":
                    check_message(following, printed.replace(f"{workplace}/", "…/"))
        except Exception as problem:  # a page is read to its end: all that is wrong is told at once
            problems.append(f"{block.place}: {type(problem).__name__}: {problem}")
    assert not problems, "\n\n".join(problems)


def check_message(quoted: Block, printed: str) -> None:
    """A block that fails is followed by its message, word for word; ``UPDATE_DOCS=1`` writes it anew."""
    assert quoted is not None and quoted.language == "text", "no text block with the message follows"
    said = next(line for line in printed.splitlines() if line.startswith("error: ")) + "\n"
    if os.environ.get("UPDATE_DOCS") == "1":
        text = quoted.page.read_text(encoding="utf-8")
        quoted.page.write_text(text.replace(f"```text\n{quoted.code}```", f"```text\n{said}```"), encoding="utf-8")
    else:
        assert said == quoted.code, f"the message is now {said!r}; UPDATE_DOCS=1 writes it into the page"


def test_the_embedded_model_is_asked_for_what_it_draws():
    """Prompts in the pages that name no other model end in a background and have words that it knows."""
    others = ("pretrained=", "adapters=", "controlnet=", "experiment=", "--from")
    asked = []
    for page in PAGES:
        for block in find_blocks(page):
            if block.language != "bash" or block.remark.startswith(("fails", "not run")):
                continue
            for words in commands(block.code):
                given = [word.partition("=")[2] for word in words if word.startswith("prompt=")]
                if "predict.py" in words and not any(word.startswith(others) for word in words):
                    asked += [(block.place, prompt) for text in given for prompt in as_list(text)]
    assert len(asked) > 15
    for place, prompt in asked:
        unknown = set(re.findall(r"[a-z]+", prompt.lower())) - KNOWN
        assert not unknown and prompt.endswith(" background"), f"{place}: {prompt}"


def as_list(text):
    """The prompts in the value of ``prompt=``."""
    return json.loads(text) if text.startswith('["') else [text.strip('"')]


def test_every_page_with_commands_is_read():
    runnable = [block for page in PAGES for block in find_blocks(page) if block.language != "text"]
    assert len(runnable) > 40 and {block.page for block in runnable} > {ROOT / "README.md", ROOT / "CONTRIBUTING.md"}


def test_no_block_has_a_language_that_nobody_runs():
    for page in PAGES:
        languages = set(re.findall(r"^\s*```([\w{}-]+)$", page.read_text(encoding="utf-8"), re.MULTILINE))
        plain = {name for name in languages if not name.startswith("{")}
        assert plain <= {"bash", "python", "text", "yaml", "json"}, f"{page}: {plain}"


def test_no_command_shows_the_path_of_a_machine():
    for page in PAGES:
        for block in find_blocks(page):
            if block.language == "bash":
                for words in commands(block.code):
                    assert not any(word.startswith(("/home", "/root", "/tmp", "/work")) for word in words), block.place
