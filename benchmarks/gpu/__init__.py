"""All that needs a GPU: loops by the clock on the wall, kernels, memory, launches and waits."""
