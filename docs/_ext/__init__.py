"""What generates pages of the documentation: from ``conf/``, from ``benchmarks/results/`` and from docstrings."""
