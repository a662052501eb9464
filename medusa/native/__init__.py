"""Decoding on a CPU in C, compiled for the machine at hand. Without a C compiler everything works, more slowly."""
