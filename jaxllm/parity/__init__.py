"""How far the backends may be apart, and how far they are."""
