"""What differs between families of checkpoints: one file each, and how a checkpoint's family is recognised."""
