"""The methods of recipe `strong`, which differ in their batches and in nothing else (peers.learning)."""
