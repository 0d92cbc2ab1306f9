"""The version, where modules can read it without the public face."""

__version__ = "0.2.0"
