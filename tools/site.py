"""Build the site: notebooks to Markdown pages in _proc/, and `mkdocs build --strict` from there into _docs/."""

import importlib.util
import os
import posixpath
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

from tools.pages import ROOT, notebooks, page_name, to_markdown

PROC, SITE = ROOT / "_proc", ROOT / "_docs"
EXTRA = {"CHANGELOG.md": "changelog.md", "LICENSE": "license.md"}  # files at the top that have a page too
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)")
NAME = re.compile(r"(?<!\[)`([A-Za-z_][\w.]*)(\(\))?`(?!\])")


def default_exp(notebook: Path) -> str | None:
    """The module that a notebook exports to, or None."""
    found = re.search(r"#\| *default_exp[: ]+([\w.]+)", notebook.read_text(encoding="utf-8"))
    return found and found[1]


def title(page: str) -> str:
    found = re.search(r"^# (.+)$", page, re.MULTILINE)
    return found[1].strip() if found else "(no title)"


def convert(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """The page of one notebook, before its links."""
    name = default_exp(notebook)
    module = f"codex_ml.{name}" if name else None
    page, pictures = to_markdown(notebook, module, output_class="{ .text .output }")
    if module:
        where = f"Module `{module}`, from `{notebook.relative_to(ROOT)}`."
        head = re.match(r"# .+\n(?:\s*\n|> .*\n)*", page)
        at = head.end() if head else 0
        page = f"{page[:at]}\n{where}\n{{ .where }}\n\n{page[at:]}"
    return page, pictures


def symbols() -> dict[str, str]:
    """Where a name is documented: `codex_ml.durable.write_atomic` and `write_atomic` to `durable.md#write_atomic`.

    A short name that two modules define leads nowhere.
    """
    spec = importlib.util.spec_from_file_location("_modidx", ROOT / "codex_ml/_modidx.py")
    assert spec and spec.loader
    index = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(index)
    full = {n: url.replace(".html", ".md") for mod in index.d["syms"].values() for n, (url, _) in mod.items()}
    short: dict[str, set[str]] = {}
    for module, names in index.d["syms"].items():
        for name in names:
            short.setdefault(name.removeprefix(module + "."), set()).add(full[name])
    return full | {name: urls.pop() for name, urls in short.items() if len(urls) == 1}


def link(page: str, name: str, known: dict[str, str], anchors: dict[str, set[str]]) -> str:
    """Point links to notebooks at their pages, and names in backticks at their documentation."""
    here = posixpath.dirname(name)
    source = posixpath.join("nbs", here)

    def to_page(m: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(source, m[2]))
        if target.endswith(".ipynb") and (ROOT / target).exists():
            target = page_name(ROOT / target)
        elif target in EXTRA:
            target = EXTRA[target]
        else:
            return m[0]
        return m[1] + posixpath.relpath(target, here or ".")

    def to_symbol(m: re.Match[str]) -> str:
        # a plain word such as `get` is linked only where it is called or qualified: it is often just a word
        plain = re.fullmatch(r"[a-z]+", m[1]) and not m[2]
        target, _, anchor = known.get(m[1], "").partition("#")
        if plain or target == name or anchor not in anchors.get(target, set()):
            return m[0]
        return f"[{m[0]}]({posixpath.relpath(target, here or '.')}#{anchor})"

    out, fenced = [], ""
    for line in page.split("\n"):
        fence = re.match(r" *(`{3,})", line)
        if fence and (not fenced or line.strip() == fenced):
            fenced = "" if fenced else fence[1]
        elif not fenced and not line.startswith("#"):
            line = LINK.sub(to_page, line)
            line = NAME.sub(to_symbol, line) if not line.lstrip().startswith("<") else line
        out.append(line)
    return "\n".join(out)


def write_pages() -> list[dict]:
    """All pages into _proc/docs; returns the navigation."""
    shutil.rmtree(PROC, ignore_errors=True)
    found = notebooks()
    pages = {page_name(notebook): convert(notebook) for notebook in found}
    anchors = {name: set(re.findall(r"\{ #(\S+) \.api \}", page)) for name, (page, _) in pages.items()}
    known = symbols()
    for name, (page, pictures) in pages.items():
        target = PROC / "docs" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(link(page, name, known, anchors), encoding="utf-8")
        for picture, content in pictures.items():
            (target.parent / picture).parent.mkdir(parents=True, exist_ok=True)
            (target.parent / picture).write_bytes(content)
    shutil.copy(ROOT / "tools/site.css", PROC / "docs/site.css")
    shutil.copy(ROOT / "CHANGELOG.md", PROC / "docs/changelog.md")
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    (PROC / "docs/license.md").write_text(f"# Licence\n\n```text\n{licence}```\n", encoding="utf-8")

    def section(*folders: str) -> list[dict[str, str]]:
        return [{title(pages[n][0]): n} for n in pages if n.rpartition("/")[0] in folders and n != "index.md"]

    nav: list[dict] = [{"Home": "index.md"}]
    nav += [{label: section(folder)} for label, folder in [("Guides", "guides"), ("Examples", "examples")]]
    nav += [{"API": section("")}, {"About": [{"Changes": "changelog.md"}, {"Licence": "license.md"}]}]
    return [entry for entry in nav if all(entry.values())]


class Links(HTMLParser):
    """What a built page loads, and what it links to."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {k: v for k, v in attrs if v}
        self.ids |= {given[k] for k in ("id", "name") if k in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and "href" in given and given.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(given["href"])
        elif "src" in given:
            self.loads.append(given["src"])


def check_site() -> list[str]:
    """What is wrong with the built pages: anything loaded from elsewhere, any link that leads nowhere."""
    pages: dict[Path, Links] = {}
    for path in sorted(SITE.rglob("*.html")):
        pages[path] = Links()
        pages[path].feed(path.read_text(encoding="utf-8"))
    wrong = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are absolute, for a server
            continue
        where = path.relative_to(SITE)
        for url in page.loads + page.links:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                if url in page.loads and parts.scheme != "data":
                    wrong.append(f"{where}: loads {url}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                wrong.append(f"{where}: {url} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                wrong.append(f"{where}: {url} names no place on that page")
    return wrong


def main() -> None:
    config = {"INHERIT": str(ROOT / "tools/mkdocs.yml"), "docs_dir": "docs", "site_dir": str(SITE), "nav": write_pages()}
    (PROC / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--clean", "-f", str(PROC / "mkdocs.yml")]
    if subprocess.run(command, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}).returncode:
        sys.exit("docs: mkdocs found the faults above. The pages it read are in _proc/docs; mend the notebooks in nbs/")
    wrong = check_site()
    if wrong:
        sys.exit("\n".join([*wrong, "docs: mend the notebooks in nbs/, then: make docs"]))
    print(f"docs: {len(list(SITE.rglob('*.html')))} pages in _docs/. To read them: .venv/bin/python -m http.server -d _docs")


if __name__ == "__main__":
    main()
