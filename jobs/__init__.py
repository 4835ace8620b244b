"""Complete job files, and the demo."""
