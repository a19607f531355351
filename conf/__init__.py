"""The configuration tree, importable as ``sdmodule.conf``."""
