"""The README tells the truth: its table of flags is the scripts', its links and commands exist.

python tests/test_readme.py      # write the table anew
"""

import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import train_dpo
import train_sft
from zephyr.distributed import parse

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
START, END = "<!-- flags -->\n", "<!-- /flags -->"


def flag_table() -> str:
    """Every flag x every recipe, as Markdown."""
    names = [f.name for f in fields(train_dpo.Knobs)]
    names += [f.name for f in fields(train_sft.Knobs) if f.name not in names]
    recipes = list(train_dpo.RECIPES)
    lines = ["| flag | " + " | ".join(recipes) + " |", "|---" * (len(recipes) + 1) + "|"]
    for name in names:
        if name == "recipe":
            continue
        cells = [cell(name, recipe) for recipe in recipes]
        lines.append(f"| `--{name.replace('_', '-')}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(name: str, recipe: str) -> str:
    values = []
    for script in (train_sft, train_dpo):
        knobs = script.Knobs(recipe=recipe, **script.RECIPES[recipe])
        values.append(shown(getattr(knobs, name)) if hasattr(knobs, name) else None)
    sft, dpo = values
    if dpo is None or sft is None:
        return f"{sft or dpo} ({'sft' if dpo is None else 'dpo'})"
    return sft if sft == dpo else f"{sft} / {dpo}"


def shown(value: object) -> str:
    text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    return re.sub(r"@([0-9a-f]{7})[0-9a-f]{33}", r"@\1...", text).replace(f"{ROOT}/", "")


def test_the_table_of_flags_is_the_scripts():
    text = README.read_text()
    assert text.partition(START)[2].partition(END)[0] == flag_table()


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert len(links) > 10
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_every_command_parses(monkeypatch):
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), re.DOTALL)
    commands = [c.split("#")[0] for block in blocks for c in re.split(r"&&|\n", block)]
    runs = [shlex.split(command) for command in commands if "train_" in command]
    assert len(runs) >= 6
    for words in runs:
        place = next(i for i, word in enumerate(words) if word.startswith("train_"))
        module = {"train_sft.py": train_sft, "train_dpo.py": train_dpo}[words[place]]
        monkeypatch.setattr(sys, "argv", words[place:])
        parse(module.Knobs, module.RECIPES)  # exits if a flag is not known


if __name__ == "__main__":
    before, _, rest = README.read_text().partition(START)
    README.write_text(before + START + flag_table() + END + rest.partition(END)[2])
