"""The methods of the fair recipe, which differ in their batches and in nothing else (peers.learning)."""
