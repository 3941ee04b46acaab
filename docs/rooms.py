"""Draw the rooms of the package from its imports: `make rooms` writes the picture into docs/architecture.md."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import grimp

PAGE = Path(__file__).parent / "architecture.md"
BEGIN, END = "<!-- rooms: written by `make rooms` -->\n", "<!-- end of rooms -->"
PACKAGE = "closedloop"


def find_rooms() -> dict[str, set[str]]:
    """Each room (a folder or file directly in the package) with the rooms that it imports."""
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=True)
    rooms = {}
    for room in sorted(graph.find_children(PACKAGE)):
        modules = {room} | graph.find_descendants(room)
        imported = {
            name.split(".")[1]
            for module in modules
            for name in graph.find_modules_directly_imported_by(module)
            if name != PACKAGE
        }
        rooms[room.split(".")[1]] = imported - {room.split(".")[1]}
    return rooms


def reach(rooms: Mapping[str, set[str]], start: str) -> set[str]:
    """The rooms that a room uses, directly or through others."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = rooms[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def draw(rooms: Mapping[str, set[str]]) -> str:
    """A Mermaid flowchart without the arrows that follow from others."""
    lines = ["```mermaid", "flowchart TD"]
    for room, imported in rooms.items():
        through = {far for near in imported for far in reach(rooms, near)}
        lines += [f"    {room} --> {near}" for near in sorted(imported - through)]
    return "\n".join([*lines, "```", ""])


def write_picture(page: str) -> str:
    """The page with the picture as the imports are now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{draw(find_rooms())}{END}{after}"


if __name__ == "__main__":
    changed = write_picture(PAGE.read_text(encoding="utf-8"))
    if "--check" in sys.argv:
        sys.exit(changed != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(changed, encoding="utf-8")
