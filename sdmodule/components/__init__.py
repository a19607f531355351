"""Checkpoints and what is loaded beside them: parts, adapters, ControlNets, learned words."""
