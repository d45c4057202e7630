"""The engine that runs cases on kernels and judges what they wrote, with its command line."""
