"""What stands in an export beside the weights: its one Python file, its cards, its transformers classes."""
