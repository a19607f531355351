"""The commands ``train`` and ``predict``; nothing outside this package knows Hydra."""
