"""The parts of a checkpoint and what is loaded beside them: adapters, ControlNets, learned words."""
