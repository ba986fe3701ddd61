"""Text to image improved by a reward on the images: the one room of the runner that knows both halves."""
