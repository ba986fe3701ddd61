"""What the commands on images share: what is sampled, and in which features sets of images are compared."""
