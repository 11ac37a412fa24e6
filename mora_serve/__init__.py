"""Serve one 4-bit language model and many LoRA adapters, mixed per request."""

__version__ = "0.1.0"
