"""What shows: reads the GPU and the board, and publishes both."""
