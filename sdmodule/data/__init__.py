"""What is trained on, and what is asked for."""
