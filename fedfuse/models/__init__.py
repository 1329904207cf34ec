"""From a batch to predictions: encoders, fusion, head."""
