"""What the benchmark compares: each method trains into a folder and gives a sampler of images."""
