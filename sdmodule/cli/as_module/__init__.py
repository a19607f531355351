"""What ``python -m sdmodule`` runs."""
