"""Computations in C++, for processors that multiply bfloat16, each one of several ways that are measured."""
