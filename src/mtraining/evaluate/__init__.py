"""What attention a pattern keeps of a model's own, head by head, and budgets chosen by it."""
