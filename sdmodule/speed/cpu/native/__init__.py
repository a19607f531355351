"""C++ kernels, compiled on this machine when they are first used."""
