"""Native CPU kernels, chosen at run time for the machine; plain PyTorch where there are none."""
