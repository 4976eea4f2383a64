"""The methods that the benchmark compares: each trains into a folder and gives a sampler of images."""
