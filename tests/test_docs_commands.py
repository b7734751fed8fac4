"""What README and docs tell the reader to type is there: targets, programs, options, files, links.

Looked for in code, that is in blocks that are not Python and in `spans`; prose is not read.
"""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PAGES = [page for page in PAGES if page.exists()]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
FOLDER = r"(?<![\w/.])(?:csrc|perturbed|tests|bench|docs)/"
PROGRAM = re.compile(r"(?:python|torchrun)\S* (?:[^`\n]* )?(\S+\.py)\b([^`\n#|;]*)")


def code(page):
    text = page.read_text()
    blocks = [body for word, body in BLOCK.findall(text) if word not in ("python", "output")]
    return "\n".join([*blocks, *(s.replace("\n", " ") for s in SPAN.findall(BLOCK.sub("", text)))])


def sources_of(program):
    """A program's text and that of those of its folder that it imports."""
    text = program.read_text()
    for name in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE):
        if (other := program.parent / f"{name}.py").exists():
            text += other.read_text()
    return text


def missing(page):
    """What a page's code names and the repository does not have."""
    text = code(page)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|[ (])make ((?:[A-Z]+=\S+ )*[a-z-]+)", text, re.MULTILINE):
        if not re.search(rf"^{target.split()[-1]}:", makefile, re.MULTILINE):
            yield f"make {target}"
    for module, suite in re.findall(r"python -m ((?:bench|perturbed)[\w.]*)(?: ([a-z]+))?", text):
        if importlib.util.find_spec(module) is None:
            yield f"python -m {module}"
        elif (
            module == "bench"
            and suite
            and f'"{suite}"' not in (ROOT / "bench/__main__.py").read_text()
        ):
            yield f"python -m bench {suite}"
    for name, options in PROGRAM.findall(text):
        program = ROOT / "docs/examples" / name
        if name in ("train.py", "script.py") or "NAME" in name:  # the reader's own
            continue
        if not (program := program if program.exists() else ROOT / name).exists():
            yield name
            continue
        known = sources_of(program).replace("_", "-")
        yield from (f"{name} --{o}" for o in re.findall(r" --([\w-]+)", options) if o not in known)
    extras = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"perturbed\[([\w-]+)\]", text):
        if not re.search(rf"^{extra} = \[", extras, re.MULTILINE):
            yield f"perturbed[{extra}]"
    for path in re.findall(FOLDER + r"[\w/.*-]*\w(?![\w<])", text):
        if not list(ROOT.glob(path)) and not re.search(r"NAME|DATE|build/", path):
            yield path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    assert sorted(set(missing(page))) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_images(page):
    """Files of a link exist, also outside of docs; the site's build checks anchors, in docs."""
    text = BLOCK.sub("", page.read_text())
    for mark, words, target in re.findall(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)[^)]*\)", text):
        assert (page.parent / target).exists(), f"{target} is not there"
        assert not mark or words.strip(), f"the image {target} has no alternative text"


def test_a_page_of_mistakes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "`make nothing`, `python -m bench nosuch`, `python -m bench.nosuch`, `csrc/nosuch.h`,\n"
        '`pip install "perturbed[nosuch]"`; make it so.\n'
        "```\npython docs/examples/nes_mnist.py --seconds 3 --nosuch\npython nosuch.py\n```\n"
    )
    assert sorted(missing(page)) == [
        "csrc/nosuch.h",
        "docs/examples/nes_mnist.py --nosuch",
        "make nothing",
        "nosuch.py",
        "perturbed[nosuch]",
        "python -m bench nosuch",
        "python -m bench.nosuch",
    ]
