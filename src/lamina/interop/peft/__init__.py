"""Lamina standing in for `import peft`.

    from lamina.interop.peft import install
    install()

From then on `from peft import LoraConfig, get_peft_model`, in a script or in a library, gives
Lamina under peft's names and with peft's semantics. `lamina as-peft script.py` does it for a
script that is to stay as it is.
"""

from lamina.interop.peft.install import install, installed, standing_in, uninstall

__all__ = ["install", "installed", "standing_in", "uninstall"]
