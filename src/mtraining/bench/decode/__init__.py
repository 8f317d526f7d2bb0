"""Decode attention over a long cache, beside what memory can give away."""
