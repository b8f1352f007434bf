"""python -m tools.forward_picture: draws docs/forward.svg, the files of one forward and what each imports of the others.

The files are those that docs/architecture.md lists under "One forward"; texts and arrows are read off their code.
"""

import ast
import html
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs" / "architecture.md", ROOT / "docs" / "forward.svg"
WIDTH, HEIGHT, GAP, LANE = 560, 46, 18, 13  # of a box, and between arrows


def files():
    """Paths relative to fastedit/ (kernels: to the repository), in reading order."""
    section = PAGE.read_text().split("## One forward", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^\d+\. `([\w/.]+)`", section, re.MULTILINE)


def arrows(names):
    """(importer, imported) as numbers in `names`."""
    found = []
    for importer, name in enumerate(names):
        if not name.endswith(".py"):
            continue
        package = Path(name).with_suffix("").parts[:-1]
        for node in ast.walk(ast.parse((ROOT / "fastedit" / name).read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            base = [part for part in base if part]
            targets = {"/".join(base) + ".py"} | {"/".join([*base, alias.name]) + ".py" for alias in node.names}
            found += [(importer, names.index(target)) for target in targets & set(names) if target != name]
    return sorted(set(found))


def says(name):
    """What a file says that it is: the first sentence of its docstring or of its first comment."""
    path = ROOT / ("fastedit" if name.endswith(".py") else "") / name
    text = path.read_text()
    said = ast.get_docstring(ast.parse(text)) if name.endswith(".py") else re.sub(r"^// ?", "", text.split("\n\n")[0], flags=re.M)
    sentence = re.split(r"(?<=\.)\s", " ".join(said.split()), maxsplit=1)[0].rstrip(".")
    return sentence if len(sentence) < 92 else sentence[:89].rsplit(" ", 1)[0] + " …"


def draw():
    """The SVG's text."""
    names = files()
    links = arrows(names)
    right = WIDTH + 30 + LANE * (len(links) + 1)
    bottom = len(names) * (HEIGHT + GAP)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right} {bottom}" font-family="sans-serif" font-size="12">',
        '<defs><marker id="head" markerWidth="7" markerHeight="6" refX="6" refY="3" orient="auto">'
        '<path d="M0,0 L7,3 L0,6 z" fill="#888"/></marker></defs>',
    ]
    for number, name in enumerate(names):
        y = number * (HEIGHT + GAP) + 4
        out.append(f'<rect x="4" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#eef3fa" stroke="#5b7fa6"/>')
        out.append(f'<text x="16" y="{y + 19}" font-weight="bold">{number + 1}. {html.escape(name)}</text>')
        out.append(f'<text x="16" y="{y + 36}" fill="#444">{html.escape(says(name))}</text>')
    for lane, (importer, imported) in enumerate(links):
        x, start, end = WIDTH + 20 + LANE * (lane + 1), *(n * (HEIGHT + GAP) + 4 + HEIGHT // 2 for n in (importer, imported))
        shift = 9 if end > start else -9
        out.append(
            f'<path d="M{WIDTH + 4},{start + shift} H{x} V{end - shift} H{WIDTH + 6}" fill="none" stroke="#888" '
            'marker-end="url(#head)"/>'
        )
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw())
    print(f"{PICTURE.relative_to(ROOT)}: {len(files())} files, {len(arrows(files()))} imports")
