"""Models for others: saved with a card, and pushed to the hub."""
