"""What benchmarks share; each benchmark is a program of its own in the folder above."""
