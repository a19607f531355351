"""Sets of tar shards at an address, read through a bounded cache on local disk."""
