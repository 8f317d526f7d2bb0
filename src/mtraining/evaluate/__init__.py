"""Long-context evaluation: needle, RULER, InfiniteBench, perplexity."""
