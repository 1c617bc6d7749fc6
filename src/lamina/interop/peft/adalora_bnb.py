"""AdaLoRA over layers of bitsandbytes: in Lamina one class serves all linear layers."""

from __future__ import annotations

from lamina.interop.peft.adalora import SVDLinear

SVDLinear8bitLt = SVDLinear
SVDLinear4bit = SVDLinear
