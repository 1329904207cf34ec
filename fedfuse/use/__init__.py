"""What a trained model is for: predictions, explanations, and a file that runs elsewhere."""
