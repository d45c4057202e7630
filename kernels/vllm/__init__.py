"""vLLM's LoRA kernels: from a release's files, a checkout, or the installed package."""
