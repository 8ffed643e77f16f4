"""What runs: builds the Ray Serve application, hosts the vLLM engines, owns processes, MPS and memory."""
