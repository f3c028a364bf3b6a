"""What XLA's compilers say about a program, for devices that need not be present."""
