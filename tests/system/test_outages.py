"""Stores that vanish under load and come back: nothing acknowledged is lost, and nobody has to help."""
