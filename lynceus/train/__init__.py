"""Floor 3: one loop for every recipe, its optimisers, its checkpoints, and what is done with a trained model."""
