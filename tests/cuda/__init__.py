"""SGLang's CUDA code on a simulated device: no GPU is needed, and each test has its own process."""
