"""``python -m sdmodule.merge PART… output_dir=FOLDER``: join the parts of a predict run; see ``--help``."""

from sdmodule.cli.merge import merge_main

if __name__ == "__main__":
    merge_main()
