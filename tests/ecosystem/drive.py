"""Run scenarios in a process of their own, with Lamina in the place of peft.

    python tests/ecosystem/drive.py hidden|visible|late|real FILE [PYTEST ARGUMENTS]

`hidden`: the real peft, where there is one, can't be imported and isn't in the metadata.
`visible`: it is importable, but Lamina answers. `late`: hidden, and the libraries are imported
before Lamina takes its place. `real`: Lamina doesn't take it; what a scenario asks of Lamina
alone fails then, all else holds of the real peft too.
"""

from __future__ import annotations

import importlib
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LIBRARIES = {
    "trainer": ["transformers.trainer"],
    "adapters": ["transformers.modeling_utils", "accelerate"],
    "preferences": ["trl.trainer.dpo_trainer", "trl.trainer.kto_trainer"],
    "tuning": ["trl.trainer.sft_trainer", "trl.trainer.grpo_trainer", "trl.trainer.reward_trainer"],
    "diffusion": ["diffusers.loaders.peft", "diffusers.loaders.lora_pipeline"],
    "sentences": ["sentence_transformers"],
}


def prepare(how: str, scenario: str) -> None:
    """Hide peft and put Lamina in its place, before anything else is imported."""
    sys.path[0] = ROOT
    os.environ["HF_HUB_OFFLINE"] = "1"
    if how == "real":
        return
    if how != "visible":
        from tests.ecosystem.without import hide

        hide("peft")
    if how == "late":
        for library in LIBRARIES[scenario]:
            importlib.import_module(library)
    from lamina.interop.peft import install

    install()


def main() -> int:
    how, file, *arguments = sys.argv[1:]
    prepare(how, os.path.splitext(os.path.basename(file))[0])
    import pytest

    # What `late` imports, pytest would have liked to see before.
    quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    switched_off = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    return int(pytest.main([file, *switched_off, *quiet, *arguments]))


if __name__ == "__main__":
    sys.exit(main())
