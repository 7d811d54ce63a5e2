"""The driver from the inside: races held open by gates."""
