"""Write constraints.txt: the exact releases in this environment, which the tests ran with."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

TARGET = Path(__file__).parents[1] / "constraints.txt"
SKIPPED = {"lamina", "pip", "setuptools", "wheel"}
OLDEST, NEXT = "3.10", "3.11"
HEADER = f"""\
# The releases that the tests run with; written by `make pins`.
# On Python {OLDEST} the pins that have dropped it are left out: pip takes the newest that fits.
"""


def pin(dist: importlib.metadata.Distribution) -> str:
    """`name==version`, without a local suffix such as `+cpu`, which no index would serve."""
    name = canonicalize_name(dist.metadata["Name"])
    version = dist.version.partition("+")[0]
    supported = SpecifierSet(dist.metadata["Requires-Python"] or "")
    # The last patch release stands for the whole minor series.
    marker = "" if f"{OLDEST}.99" in supported else f" ; python_version >= '{NEXT}'"
    return f"{name}=={version}{marker}"


def main() -> None:
    """Rewrite the file from the installed distributions."""
    pins = {pin(dist) for dist in importlib.metadata.distributions() if wanted(dist)}
    TARGET.write_text(HEADER + "\n".join(sorted(pins)) + "\n", encoding="utf-8")
    print(f"{len(pins)} pins in {TARGET.name}")


def wanted(dist: importlib.metadata.Distribution) -> bool:
    """Whether the distribution is one that installing Lamina brings."""
    return canonicalize_name(dist.metadata["Name"]) not in SKIPPED


if __name__ == "__main__":
    main()
