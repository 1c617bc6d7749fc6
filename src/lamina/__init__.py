"""Lamina: fine-tune a model in several stages with LoRA, each stage built on the one before."""
