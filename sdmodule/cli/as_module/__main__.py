"""``python -m sdmodule``: what is installed and how to use it."""

from sdmodule.cli.about import main

if __name__ == "__main__":
    main()
