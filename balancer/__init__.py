"""What decides: pure functions from a snapshot of the board to a decision, the board itself and two thin adaptors."""
