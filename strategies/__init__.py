"""What can be asked of a kernel: Hypothesis strategies, cases and the tensors that a case stands for."""
