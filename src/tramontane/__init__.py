"""Tramontane: open language models, fast, on the machine at hand."""

__version__ = "0.1.0"
