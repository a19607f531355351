"""``python -m sdmodule.data.pack data.root=FOLDER output_dir=FOLDER``: pack data for ``data=streaming``."""

from sdmodule.cli.main import pack_main

if __name__ == "__main__":
    pack_main()
