"""What ``python -m sdmodule.data.NAME`` runs."""
