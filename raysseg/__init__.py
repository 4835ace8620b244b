"""Train, tune, evaluate and serve image-segmentation models on a Ray cluster."""
