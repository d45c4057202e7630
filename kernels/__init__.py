"""What is under test: released kernels, a user's own, and small examples."""
