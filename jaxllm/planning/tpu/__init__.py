"""TPUs without a TPU: the real step compiled for a real topology, and what its program tells about memory and time."""
