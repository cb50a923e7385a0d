"""The online half: scores over HTTP, live experiments, and the events that they leave."""

EMBEDDED = "sqlite:///runs/events.db"
"""Where servers keep exposures and events that are told no other database, and where commands look for them."""
