"""Denoisers and encoders written by hand, the way other people write them: small, whole, and each with a habit of its own."""
