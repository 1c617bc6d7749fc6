"""The fields of `LoraConfig` whose feature doesn't exist here: refused by name, never ignored."""

from __future__ import annotations

# The value that means "off" is the field's default. Megatron's parallel layers need megatron-core,
# which nobody here can install and test.
NOT_SUPPORTED = ("megatron_config",)
