"""What the kernels are held against: production shapes, the code made for Hopper, and measurements on a GPU."""
