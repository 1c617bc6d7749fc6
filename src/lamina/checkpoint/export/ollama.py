"""For ollama: a LoRA in GGUF, and the Modelfile that lays it over a base.

Source: ollama, `docs/modelfile.mdx` (FROM, ADAPTER).
"""

from __future__ import annotations

from pathlib import Path

from lamina.checkpoint.export.contents import Contents, Finding
from lamina.checkpoint.export.gguf import FILE, Gguf
from lamina.checkpoint.export.target import Checked, Options
from lamina.checkpoint.export.updates import Updates

MODELFILE = "Modelfile"


class Ollama(Gguf):
    """`ollama create NAME -f DIR/Modelfile`."""

    name = "ollama"
    program = "llama.cpp"
    files = (FILE, MODELFILE)
    takes_methods = ()

    def check(self, contents: Contents, options: Options) -> Checked:
        """What llama.cpp can't take, and the name of the base, which only the user knows."""
        checked = super().check(contents, options)
        faults = [*checked.faults, *_name_faults(options.served_base)]
        note = Finding(
            "ollama takes the chat template of the base",
            "if the adapter was trained with another one, write it into the Modelfile as TEMPLATE",
        )
        return Checked(faults, [*checked.notes, note])

    def write(self, updates: Updates, directory: Path, options: Options) -> None:
        """Write `adapter.gguf` and `Modelfile`."""
        super().write(updates, directory, options)
        text = f"FROM {options.served_base}\nADAPTER ./{FILE}\n"
        (directory / MODELFILE).write_text(text, encoding="utf-8")


def _name_faults(name: str | None) -> list[Finding]:
    if name is None:
        return [
            Finding(
                "what ollama calls the base is not known",
                "--from NAME, as `ollama list` shows it, or --from PATH of the base's GGUF; it has "
                "to be the base that the adapter was trained on",
            )
        ]
    if not name.strip() or not name.isprintable():
        return [Finding(f"{name!r} is no name for FROM", "--from NAME on one line")]
    return []
