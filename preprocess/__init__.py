"""Files that people send → what the models need; for requests and for training."""
