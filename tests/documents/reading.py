"""What a reader of the documents can type: shell commands and Python blocks, in order."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```",
                    re.DOTALL | re.MULTILINE)  # fmt: skip
#: "`net.py`:" at the end of a paragraph says that the block below is that file.
_FILE = re.compile(r"`([\w.-]+\.(?:py|toml))`[^`]*:\s*\Z")
#: A pipe or a redirection.
_OUTPUT = re.compile(r"\||\d?>>?(&\d)?")


@dataclass(frozen=True)
class Step:
    """One thing to do: a shell command, a Python block, or a file to write.

    Attributes
    ----------
    document : str
        Path below the root of the checkout.
    line : int
        Where the block starts.
    language : str
        ``sh``, ``python`` or ``toml``.
    text : str
        One command, without its comment; or the whole block.
    file : str or None
        The file that the document says the block is.
    """

    document: str
    line: int
    language: str
    text: str
    file: str | None = None

    def __str__(self) -> str:
        head = self.text if self.language == "sh" else f"{self.language}, {self.file or 'block'}"
        return f"{self.document}:{self.line}: {head}"


def documents() -> list[str]:
    """Return every Markdown file that has something to type."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("results/**/*.md")]
    names = [str(f.relative_to(ROOT)) for f in sorted(files)]
    return [n for n in names if not n.startswith("results/runs/") and steps(n)]


def steps(document: str) -> list[Step]:
    """Return the steps of a document, in its order."""
    text = (ROOT / document).read_text()
    found = []
    for block in _FENCE.finditer(text):
        language = {"bash": "sh", "shell": "sh", "py": "python"}.get(block["language"])
        language = language or block["language"]
        if language not in ("sh", "python", "toml"):
            continue
        line = text.count("\n", 0, block.start()) + 1
        named = _FILE.search(text[: block.start()])
        file = named[1] if named and language != "sh" else None
        content = dedent(block["text"])
        texts = _commands(content) if language == "sh" else [content]
        found += [Step(document, line, language, t, file) for t in texts]
    return found


def _commands(block: str) -> list[str]:
    """Return the commands of a block: continued lines joined, comments and prompts taken away."""
    commands = []
    for line in re.sub(r"\\\n\s*", " ", block).splitlines():
        words = split(line.removeprefix("$ "))
        while "&&" in words:
            place = words.index("&&")
            commands.append(_join(words[:place]))
            words = words[place + 1 :]
        commands.append(_join(words))
    return [c for c in commands if c]


def split(command: str) -> list[str]:
    """Split a command into words as a shell does; pipes and redirections are words."""
    # shlex would make two words of "2>"; quoted, it stays one.
    command = re.sub(r"(?<!\S)(\d?>>?&\d|\d>>?)", r"'\1' ", command)
    reader = shlex.shlex(command, posix=True, punctuation_chars="|>&;")
    reader.whitespace_split = True
    return list(reader)


def cut(words: list[str]) -> tuple[list[str], list[str]]:
    """Return a command, and where its output goes: pipes and redirections, ``2> FILE`` as well."""
    place = next((n for n, w in enumerate(words) if _OUTPUT.fullmatch(w)), len(words))
    return words[:place], words[place:]


def _join(words: list[str]) -> str:
    return " ".join(w if w == "&" or _OUTPUT.fullmatch(w) else shlex.quote(w) for w in words)


def spans(document: str) -> list[str]:
    """Return what a document's text calls ``fedleak ...``, outside of blocks."""
    text = _FENCE.sub("", (ROOT / document).read_text())
    found = re.findall(r"`(fedleak [^`]+)`", text)
    return [" ".join(span.split()) for span in found if "..." not in span and "…" not in span]
