"""The demo: a small model taken through three stages of real text."""
