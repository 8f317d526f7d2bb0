"""What a run will need, predicted from shapes."""
