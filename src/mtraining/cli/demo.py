def demo() -> None:
    """Placeholder replaced below."""
