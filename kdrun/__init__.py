"""kdrun: the experiment runner for knowledge distillation. See README.md; nothing heavy is imported here."""

__version__ = "0.1.0"
