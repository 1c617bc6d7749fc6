"""The fields of `LoraConfig` whose feature doesn't exist here: refused by name, never ignored."""

from __future__ import annotations

# The value that means "off" is the field's default.
NOT_SUPPORTED = (
    "megatron_config",
)
