"""What the site needs beside mkdocs: pages of the examples, links that also work in a checkout,
names in the text that lead to the reference. mkdocs calls the functions ``on_*`` (mkdocs.yml).
"""

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
log = get_plugin_logger("hooks")

LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")
DIRECTIVE = re.compile(r"^::: (perturbed[\w.]*)$", re.MULTILINE)
# Pieces of a page that are left alone, headings of documented objects, and what may be a name:
# `NES`, `pm.set_grad`; in docstrings also :class:`~perturbed.NES`.
NAME = re.compile(
    r'<h\d id="(?P<object>perturbed\.[\w.]+)".*?</h\d>|<(?P<skip>pre|a|h\d)\b.*?</(?P=skip)>'
    r"|(?:<code>)?docs/(?P<page>[\w/-]+\.md)(?:</code>)?"
    r"|(?::(?P<role>class|func|meth|mod|attr|data|exc):)?"
    r"<code>~?(?P<name>[A-Za-z_.][\w.]*)(?P<call>\(\))?</code>",
    re.DOTALL,
)
FILE_NAME = re.compile(r'(<a href="[^"]*">)([\w./-]+\.md)</a>')  # as the text of a link
_objects: dict[str, str] = {}  # last name of a documented object -> its whole name


def on_files(files, config):
    """Add a page for every example and the changelog; learn the names of the reference."""
    for path in sorted((DOCS / "examples").glob("*.py")):
        uri = f"examples/{path.name}"
        files.remove(files.get_file_from_path(uri))
        page = File.generated(config, f"examples/{path.stem}.md", content=_example(path))
        page.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(page)
    changes = (ROOT / "CHANGELOG.md").read_text()
    files.append(File.generated(config, "changelog.md", content=changes))
    _objects.clear()
    for page in (DOCS / "reference").glob("*.md"):
        for identifier in DIRECTIVE.findall(page.read_text()):
            _objects[identifier.rpartition(".")[2]] = identifier
    return files


def _example(path):
    text = path.read_text()
    title = ast.get_docstring(ast.parse(text)).partition("\n")[0]
    title = title.partition(": ``")[0].rstrip(".:").replace("``", "`")
    return (
        f"# {title}\n\n`docs/examples/{path.name}`, [one of the examples](../examples.md).\n\n"
        f"````python\n{text}````\n"
    )


def on_page_markdown(markdown, page, config, files):
    """Lead links to examples to their pages; links to other files of the repository to its site."""

    def link(match):
        text, target = match.groups()
        path = target.partition("#")[0]
        uri = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), path))
        if uri.startswith("examples/") and uri.endswith(".py"):
            return f"[{text}]({path.removesuffix('.py')}.md)"
        if not uri.startswith("../"):
            return match[0]
        uri = uri.removeprefix("../")
        if not (ROOT / uri).exists():
            log.warning(f"{page.file.src_uri}: {target} is not in the repository")
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{uri})"
        return text if "`" in text else f"`{text}`"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [LINK.sub(link, part) for part in parts[::2]]
    return "".join(parts)


def on_page_content(html, page, config, files):
    """Link names of the package to the reference, where they are in it, and ``docs/x.md`` to x.

    Links that are called by their file, which is right in a checkout, get the title of the page.
    """
    owner = ""  # the class or function of the reference that the text belongs to

    def reference(match):
        nonlocal owner
        if match["object"]:
            owner = max((i for i in _objects.values() if _is_in(match["object"], i)), default="")
        if match["page"]:
            target = files.get_file_from_path(match["page"])
            return _page_link(target, page) if target else match[0]
        name = match["name"]
        if name is None:
            return match[0]
        shown = name.rpartition(".")[2] if "<code>~" in match[0] else name.lstrip(".")
        shown = f"<code>{shown}{match['call'] or ''}</code>"
        target = _identifier(name, match["role"], owner)
        if target in ("", owner):
            return shown
        return f'<autoref identifier="{target}" optional>{shown}</autoref>'

    def title(match):
        uri = posixpath.join(posixpath.dirname(page.file.src_uri), match[2])
        target = files.get_file_from_path(posixpath.normpath(uri))
        return f"{match[1]}{target.page.title if target else match[2]}</a>"

    return FILE_NAME.sub(title, NAME.sub(reference, html))


def _page_link(target, page):
    title = target.page.title or target.src_uri
    return f'<a href="{target.url_relative_to(page.file)}">{title}</a>'


def _is_in(identifier, parent):
    return identifier == parent or identifier.startswith(parent + ".")


def _identifier(name, role, owner):
    """Find what a name means, "" if it is none of ours. A plain lower-case word never is."""
    parts = name.split(".")
    if parts[0] == "pm" and len(parts) > 1:
        parts[0] = "PerturbedModel"
    if not role and len(parts) == 1 and name.islower() and "_" not in name:
        return ""
    for i in reversed(range(len(parts))):
        if parts[i] in _objects:
            return ".".join([_objects[parts[i]], *parts[i + 1 :]])
    return f"{owner}.{name}" if role in ("meth", "attr") and owner else ""
