"""What is measured: load generators, the simulator, peers, and under results/ what they printed."""
