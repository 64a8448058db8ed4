"""Write README.md from nbs/index.ipynb, or (--check) say whether it is in step."""

import argparse
import posixpath
import re
import sys

from tools.pages import NBS, ROOT, to_markdown

HEAD = "<!-- Made from nbs/index.ipynb by `make sync`. Edit the notebook, not this file. -->\n\n"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")


def readme() -> str:
    """The text of README.md; links that are relative to nbs/ become relative to the top."""
    body, pictures = to_markdown(NBS / "index.ipynb")
    if pictures:
        sys.exit("readme: nbs/index.ipynb shows a picture, which README.md cannot carry. Move it to a guide.")
    body = LINK.sub(lambda m: posixpath.normpath(posixpath.join("nbs", m[0])), body)
    dead = sorted({m[0] for m in LINK.finditer(body) if not (ROOT / m[0]).exists()})
    if dead:
        sys.exit(f"readme: nbs/index.ipynb links to what is not there: {', '.join(dead)}. Mend them, then: make sync")
    return HEAD + body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where README.md is not in step")
    check = parser.parse_args().check
    target, text = ROOT / "README.md", readme()
    same = target.exists() and target.read_text(encoding="utf-8") == text
    if check and not same:
        sys.exit("readme: README.md is not what nbs/index.ipynb makes. Mend it with: make sync")
    if not same:
        target.write_text(text, encoding="utf-8")
    print("readme: README.md is in step" if same else "readme: README.md written")


if __name__ == "__main__":
    main()
