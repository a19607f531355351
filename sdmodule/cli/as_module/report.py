"""``python -m sdmodule.report RUN [RUN …]``: a page on trainings; see ``--help``."""

from sdmodule.cli.report import report_main

if __name__ == "__main__":
    report_main()
