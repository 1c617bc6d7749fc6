"""What a stage may be called: its name becomes an adapter's, and a folder's."""

from __future__ import annotations

import re

from lamina.engine.state import AdapterState
from lamina.errors import AdapterNameError

# Such names mean devices on Windows, with any ending.
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)
_UNSAFE = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]')
_LONGEST = 200


def name_faults(name: object) -> list[str]:
    """What is wrong with a name as a stage's and as that of one folder; a line each."""
    if not isinstance(name, str):
        return [f"{name!r} is not a string"]
    try:
        AdapterState().check_new_name(name)
    except AdapterNameError as error:
        return [f"{name!r} can't be used: {error.cure}"]
    faults = []
    if _UNSAFE.search(name):
        faults.append(f"{name!r} has characters that no folder's name should have")
    if name != name.strip() or name.startswith("~"):
        faults.append(f"{name!r} begins or ends with blanks, or begins with '~'")
    if _DEVICES.fullmatch(name):
        faults.append(f"{name!r} is the name of a device on Windows")
    encoded = name.encode("utf-8", "replace")
    if encoded.decode() != name:
        faults.append(f"{name!r} is no text: it has halves of characters")
    if len(encoded) > _LONGEST:
        faults.append(f"{name[:40] + '...'!r} is longer than {_LONGEST} bytes")
    return faults
