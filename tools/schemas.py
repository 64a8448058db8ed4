"""Write codex_ml/schemas/ anew from the dataclasses in telemetry.schema, or (--check) prove that it is in step."""

import argparse
import sys
from pathlib import Path

from codex_ml.telemetry.schema import schema_files

FOLDER = Path(__file__).resolve().parent.parent / "codex_ml/schemas"


def differences(folder: Path) -> list[str]:
    """What is not in step, one entry a file."""
    wanted = schema_files()
    found = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} if folder.is_dir() else {}
    said = []
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            what = "no dataclass makes this file" if name not in wanted else "not what its dataclass says" if name in found else "missing"
            said.append(f"codex_ml/schemas/{name}: {what}")
    return said


def write(folder: Path) -> None:
    """Make `folder` hold the schemas, and nothing else."""
    folder.mkdir(exist_ok=True)
    wanted = schema_files()
    for path in folder.iterdir():
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.schemas", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where something is not in step")
    check = parser.parse_args().check
    found = differences(FOLDER)
    if check and found:
        print("\n".join(found), file=sys.stderr)
        sys.exit("schemas: not in step with telemetry.schema. Mend it with: make sync, then look at git diff")
    if found:
        write(FOLDER)
    print("\n".join(["schemas: written", *found]) if found else f"schemas: {len(schema_files())} files are in step")


if __name__ == "__main__":
    main()
