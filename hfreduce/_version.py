"""The version, readable without the binary."""

__version__ = "0.1.0"
