"""What the answer must be: pure-torch oracles with derived error bounds. Nothing here imports a kernel."""
