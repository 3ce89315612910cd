"""What the kernels read, write and compile to, counted without a GPU."""
