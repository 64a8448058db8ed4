"""From a notebook to Markdown: nbdev's processors and parameter tables, then nbconvert. README.md and the site both come from here."""

import ast
import inspect
import re
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from fastcore.docments import DocmentTbl
from fastcore.nbio import read_nb
from jinja2 import DictLoader
from nbconvert import MarkdownExporter
from nbdev import processors
from nbdev.process import NBProcessor
from nbformat import NotebookNode, from_dict

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"

TEMPLATE = """
{%- extends 'markdown/index.md.j2' -%}
{% block input %}{% if cell.source.strip() %}
```python
{{ cell.source }}
```
{% endif %}{% endblock input %}
{% block stream %}
{{ fence(output.text) }}
{% endblock stream %}
{% block data_text scoped %}
{{ fence(output.data['text/plain']) }}
{% endblock data_text %}
{% block error %}
{{ fence(output.ename ~ ': ' ~ output.evalue) }}
{% endblock error %}
"""


def notebooks() -> list[Path]:
    """Every notebook under nbs/, index first, modules by number, then the folders."""
    found = (p for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts))
    return sorted(found, key=lambda p: (len(p.parts), p.name != "index.ipynb", p))


def page_name(notebook: Path) -> str:
    """The page of a notebook, relative to the site: `nbs/00_durable.ipynb` is `durable.md` (as in `_modidx.py`)."""
    relative = notebook.relative_to(NBS)
    return relative.with_name(re.sub(r"^\d+_", "", relative.name)).with_suffix(".md").as_posix()


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def document(node: Definition, sym: Any) -> str:
    """One name of a module: signature, docstring, a table of its parameters, its methods, its source."""
    parts = [_entry(node, sym, node.name, 3)]
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name[0] != "_" and ast.get_docstring(method):
                member = vars(sym)[method.name]
                function = getattr(member, "fget", None) or getattr(member, "__func__", member)
                parts.append(_entry(method, function, f"{node.name}.{method.name}", 4))
    source = "\n".join(f"    {line}".rstrip() for line in ["````python", *inspect.getsource(sym).splitlines(), "````"])
    return "\n\n".join([*parts, f'??? source "Source"\n\n{source}'])


def _entry(node: Definition, sym: Any, name: str, level: int) -> str:
    heading = f"{'#' * level} {name} {{ #{name.lower()} .api }}"
    table = DocmentTbl(sym) if not isinstance(node, ast.ClassDef) or is_dataclass(sym) else None
    parts = [heading, f"```python\n{signature(node, name)}\n```", ast.get_docstring(node)]
    shown = str(table).replace("<factory>", "") if table and table.has_docment else None
    return "\n\n".join(filter(None, [*parts, shown]))


def signature(node: Definition, name: str, width: int = 88) -> str:
    """A definition's head as its author wrote it, one parameter a line where it is long."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        start = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        fields = [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign)]
        fields = [re.sub(r"field\(default_factory=(\w+)\)$", r"\1()", f) for f in fields]
        if not start and not (fields and any("dataclass" in ast.unparse(d) for d in node.decorator_list)):
            return f"class {name}" + (f"({bases})" if bases else "")
        parameters, arrow = _parameters(start) if start else fields, ""
    else:
        parameters = _parameters(node)
        arrow = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        if any(ast.unparse(d) == "property" for d in node.decorator_list):
            return name + arrow.replace(" ->", ":", 1)
    line = f"{name}({', '.join(parameters)}){arrow}"
    return line if len(line) <= width else f"{name}(\n" + "".join(f"    {p},\n" for p in parameters) + f"){arrow}"


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    parts, depth, start, text = [], 0, 0, ast.unparse(node.args) + ","
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    # unparse writes `a: int=1`
    parts = [re.sub(r"^(\w+: [^=]*[^= ])=(?!=)", r"\1 = ", p) for p in parts if p]
    return parts[1:] if parts[:1] in (["self"], ["cls"]) else parts


def add_api(nb: Any, module: ModuleType) -> None:
    """Replace every exported cell by the documentation of the public names that it defines."""
    for cell in nb.cells:
        if cell.cell_type != "code" or not {"export", "exports", "exporti"} & cell.directives_.keys():
            continue
        found = [n for n in ast.parse(cell.source).body if isinstance(n, Definition) and not n.name.startswith("_")]
        pages = [document(n, getattr(module, n.name)) for n in found if "hide" not in cell.directives_]
        cell.outputs = [{"output_type": "display_data", "metadata": {}, "data": {"text/markdown": p}} for p in pages]
        if "exports" not in cell.directives_:
            cell.source = ""


def to_markdown(notebook: Path, module: str | None = None, output_class: str = "text") -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook with its stored outputs, and the picture files that it shows.

    Nothing is run. Where `module` is named, exported cells give way to the documentation of what they define.
    """
    work = NBProcessor(nb=read_nb(notebook), rm_directives=True)
    if module:
        add_api(work.nb, import_module(module))
    for cell in work.nb.cells:
        if cell.directives_.keys() & {"hide", "default_exp"}:
            cell.source, cell.outputs = "", []
    steps = [processors.strip_ansi, processors.hide_line, processors.clean_magics]
    NBProcessor(nb=work.nb, procs=steps).process()
    nb = from_dict(_plain(work.nb))
    assert isinstance(nb, NotebookNode)

    def fence(text: str) -> str:
        ticks = "````" if "```" in text else "```"
        return f"{ticks}{output_class}\n{text.rstrip()}\n{ticks}"

    exporter = MarkdownExporter(extra_loaders=[DictLoader({"page.md.j2": TEMPLATE})], template_file="page.md.j2")
    exporter.environment.globals["fence"] = fence
    stem = notebook.stem
    body, resources = exporter.from_notebook_node(nb, {"unique_key": stem, "output_files_dir": f"{stem}_files"})
    body = re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"
    return "\n".join(line.rstrip() for line in body.split("\n")), resources.get("outputs", {})


def _plain(nb: Any) -> dict[str, Any]:
    """An nbformat notebook from execnb's, without the fields that nbdev keeps on it."""
    keep = {"markdown": ("source",), "raw": ("source",), "code": ("source", "outputs", "execution_count")}
    cells = []
    for cell in nb.cells:
        fields = {k: cell.get(k) for k in keep[cell.cell_type]}
        if cell.cell_type == "code":
            fields["outputs"] = [_joined(dict(o)) for o in cell.get("outputs") or []]
        cells.append({"cell_type": cell.cell_type, "metadata": {}, "id": cell.id, **fields})
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def _joined(value: Any) -> Any:
    """Lists of lines, as notebooks store text, made one string."""
    if isinstance(value, dict):
        return {k: _joined(v) for k, v in value.items()}
    return "".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
